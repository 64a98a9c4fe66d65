"""Devices without fp64 (Apple's GPUs, Intel's Arc), played by a CPU that refuses it."""

import pytest
import torch
from batches import preference_batch, run
from composites import image_batch, tiny_composite
from families import tiny_model
from test_comparison import batch_of
from test_logps import PAIRS
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    completion_logps,
    enable_prefix_sharing,
)
from hf_prefix_patch.comparison import compare_sharing


class WithoutDoubles(TorchFunctionMode):
    """Only what came through `cpu()`, and what is made of that alone, may be fp64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = (
            [x for x in tree_leaves(values) if isinstance(x, Tensor)]
            for values in ((args, kwargs), result)
        )
        if func is Tensor.cpu:
            result = result.clone()
            result.on_host = True
            return result
        for x in made:
            x.on_host = bool(given) and all(getattr(y, "on_host", False) for y in given)
            if x.dtype == torch.float64 and not x.on_host:
                raise TypeError("Cannot convert a tensor to float64, which this device lacks")
        return result


@pytest.fixture
def without_doubles():
    with WithoutDoubles():
        with pytest.raises(TypeError, match="which this device lacks"):
            torch.ones(2).double()
        assert torch.ones(2).cpu().sum().double().dtype == torch.float64
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models(without_doubles, dtype):
    model = tiny_model().to(dtype)
    with enable_prefix_sharing(model) as sharing:
        run(model, preference_batch())
    assert sharing.stats.calls == 1


@pytest.mark.filterwarnings("ignore:a row has no completion token:UserWarning")
@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_completion_logps(without_doubles, layout):
    model = tiny_model()
    batch = DataCollatorWithPrefixSharing(pad_token_id=0, layout=layout)(PAIRS)
    with enable_prefix_sharing(model) as sharing:
        completion_logps(model, batch).sum().backward()
    assert sharing.stats.calls == 1


def test_images(without_doubles):
    batch, media = image_batch("qwen2.5-vl", (0,), (1,), (0,), (1,))
    model = tiny_composite("qwen2.5-vl")
    with enable_prefix_sharing(model) as sharing:
        run(model, batch, **media)
    assert (sharing.stats.calls, sharing.stats.bypassed) == (1, {})


def test_comparison(without_doubles):
    model = tiny_model()
    assert compare_sharing(model, batch_of(model)).verdict == "equal"
