"""Peak memory, counted."""

import torch

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
