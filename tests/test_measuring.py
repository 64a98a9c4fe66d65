"""Peak memory, counted."""

import torch
from torch._library.custom_ops import OPDEFS

from hf_prefix_patch import PrefixTree
from hf_prefix_patch.backends import cpu, sdpa
from hf_prefix_patch.backends.base import as_tensor, chain_blocks, segment_blocks
from hf_prefix_patch.measuring import TensorMemory


def test_tensor_memory():
    """What is there counts nothing, what is made counts while it lives, views count nothing."""
    x = torch.zeros(1024)
    with TensorMemory() as memory:
        a = x + 1
        b = (a * 2).view(32, 32)
        assert memory.now == 2 * 4096
        del a
        x.add_(1)
        c = b[0] + 1
        assert memory.now == 4096 + 128
        del b, c
    assert (memory.now, memory.peak) == (0, 2 * 4096)


def calls():
    """Every operator of the package and its arguments, on two rows in bf16."""
    rows = torch.arange(600).repeat(2, 1)
    rows[1, 500:] += 1000
    tree = PrefixTree.from_rows(rows)
    segments, chains = as_tensor(segment_blocks(tree)), as_tensor(chain_blocks(tree))
    shape = 1, tree.packed_tokens, 2, 16
    grad, *inputs = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(4)]
    inputs = [x.transpose(1, 2).requires_grad_() for x in inputs]
    options = None, chains, None, 0.25, 0.0, None, None
    output = [x.detach() for x in cpu.cpu_attention(*inputs, segments, 0.25)]
    yield cpu.cpu_attention, (*inputs, segments, 0.25)
    yield cpu.cpu_attention_backward, (grad, *inputs, *output, segments, 0.25)
    yield sdpa.chain_attention, (*inputs, *options)
    yield sdpa.chain_attention_backward, (grad, *inputs, *options)


def test_operators_of_the_package_are_looked_into():
    """Their peaks are those of their Python bodies, beyond what they return, their results too."""
    found = {}
    for operator, arguments in calls():
        measured = []
        for call in (operator, operator._init_fn):
            with TensorMemory() as memory, torch.no_grad():
                output = call(*arguments)
            measured.append((memory.peak, memory.now, output))
        (peak, now, output), (want_peak, _, want) = measured
        assert peak == want_peak
        torch.testing.assert_close(output, want)
        found[operator._qualname] = peak, now
    assert all(peak > now for peak, now in found.values())  # they make more than they return
    assert set(found) == {name for name in OPDEFS if name.startswith("hf_prefix_patch::")}


def test_gradients_through_an_operator_that_is_looked_into():
    (operator, arguments), *_ = calls()
    inputs = arguments[:3]
    want = torch.autograd.grad(operator(*arguments)[0].float().sum(), inputs)
    with TensorMemory():
        got = torch.autograd.grad(operator(*arguments)[0].float().sum(), inputs)
    torch.testing.assert_close(got, want)
