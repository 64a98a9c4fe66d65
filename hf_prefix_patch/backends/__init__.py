"""The attention backends.

base          Backend, Needs, and the chains that all of them attend by
sdpa          PyTorch's scaled_dot_product_attention, a call for each chain: runs everywhere
cpu           what sdpa does on a CPU: no copy of a key, no masked score
varlen        torch_varlen and flash: one variable-length call for the whole packed row
flex          FlexAttention with a block-sparse mask, as in the paper
"""
