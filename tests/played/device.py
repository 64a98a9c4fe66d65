"""A CUDA device that the CPU plays, for the tests marked `gpu` where there is none.

Its tensors say `cuda:0` and hold their numbers on the host. As on a GPU, tensors of two devices
that meet raise, and so does what waits for the device under `torch.cuda.set_sync_debug_mode`.
Autograd, autocast and checkpointing take it for a GPU, once `device.cpp` is preloaded. It computes
as the CPU does: nothing of a kernel, a compiler or an allocator of CUDA is tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hf_prefix_patch import planned

aten = torch.ops.aten

_COPIES = {aten._to_copy.default, aten.copy_.default}
_INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
# What they return, or its size, is known once the device is done.
_WAITS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
}
_debug_mode = ["default"]


class Played(Tensor):
    """`numbers` are on the host; all else says `cuda:0`."""

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        self = Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device("cuda", 0),
        )
        self.numbers = numbers
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        _wait("tolist")
        return self.detach().numbers.tolist()

    def as_subclass(self, cls):
        """A tensor of this package that is played as well, which PyTorch's own would not be."""
        return (Played if cls is Tensor else _played(cls))(self.numbers)

    def __repr__(self):
        return f"Played({self.numbers!r})"


_classes: dict[type, type] = {}


def _played(cls: type) -> type:
    if cls not in _classes:
        _classes[cls] = type(f"Played{cls.__name__}", (cls, Played), {})
    return _classes[cls]


def _type(x: Any) -> type:
    """What its type would be on a GPU."""
    real = {Played: Tensor} | {played: cls for cls, played in _classes.items()}
    return real.get(type(x), type(x))


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator on the numbers of tensors that are played, or one that makes such tensors."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    device = kwargs.get("device")
    to_device = device is not None and torch.device(device).type == "cuda"
    if not to_device and not any(isinstance(x, Played) for x in given):
        return func(*args, **kwargs)
    _check_devices(func, given)
    _note_waits(func, args, kwargs, given)
    stays = to_device or (device is None and isinstance(given[0], Played))
    options = {name: x for name, x in kwargs.items() if name != "pin_memory"}
    if device is not None:
        options["device"] = "cpu"
    numbers = tree_map(lambda x: x.numbers if isinstance(x, Played) else x, (args, options))
    output = _REPLACED.get(func, func)(*numbers[0], **numbers[1])

    def wrap(x: Any) -> Any:
        if not stays or not isinstance(x, Tensor):
            return x
        in_place = [y for y in given if isinstance(y, Played) and y.numbers is x]
        return in_place[0] if in_place else Played(x)

    return tree_map(wrap, output)


def _check_devices(func: Any, given: list[Tensor]) -> None:
    """Scalars, indices and what is copied may be on the host."""
    host = [list(x.shape) for x in given if not isinstance(x, Played) and x.ndim]
    indexed = func in _INDEXED and isinstance(given[0], Played)
    if host and func not in _COPIES and not indexed:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
            f"and cpu! (those of {host} given to {func})"
        )


def _note_waits(func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor]) -> None:
    waits = func in _WAITS
    if func in _INDEXED:  # a mask's count, or indices that come from the host
        waits = any(x.dtype == torch.bool or not isinstance(x, Played) for x in given[1:])
    elif func in _COPIES:
        to = given[0].device if func is aten.copy_.default else kwargs.get("device")
        crosses = to is not None and torch.device(to).type != given[-1].device.type
        waits = crosses and not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    if waits:
        _wait(str(func))


def _wait(what: str) -> None:
    if _debug_mode[0] == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


@contextmanager
def unwatched() -> Iterator[None]:
    """Where a kernel is played, nothing waits."""
    before, _debug_mode[0] = _debug_mode[0], "default"
    try:
        yield
    finally:
        _debug_mode[0] = before


def _softmax(function: Any) -> Any:
    """The CPU has no softmax from half precision to fp32."""
    return lambda x, dim, to_float: function(x.float() if to_float else x, dim, False)


def _softmax_backward(function: Any) -> Any:
    return lambda grad, y, dim, dtype: function(grad, y, dim, grad.dtype).to(dtype)


def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """CUDA adds one after another in the type of `x`, where the CPU has a sum in fp32."""
    turn = (index[:, None] == index).tril(-1).sum(1)
    for n in turn.unique():
        (now,) = (turn == n).nonzero(as_tuple=True)
        x = x.index_add(dim, index[now], source.index_select(dim, now))
    return x


_REPLACED = {
    aten.index_add.default: _index_add,
    aten.mm.dtype: lambda a, b, dtype: torch.mm(a.to(dtype), b.to(dtype)),
    aten.addmm.dtype_out: lambda c, a, b, dtype, beta=1, alpha=1, out=None: out.copy_(
        torch.addmm(*(x.to(dtype) for x in (c, a, b)), beta=beta, alpha=alpha)
    ),
    aten.histc.default: lambda x, *args: torch.histc(x.float(), *args).to(x.dtype),
    aten._softmax.default: _softmax(aten._softmax.default),
    aten._log_softmax.default: _softmax(aten._log_softmax.default),
    aten._softmax_backward_data.default: _softmax_backward(aten._softmax_backward_data.default),
    aten._log_softmax_backward_data.default: _softmax_backward(
        aten._log_softmax_backward_data.default
    ),
}


class _Operators(TorchDispatchMode):
    """Those that are given no tensor of the device, but are told to make one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What reaches for the device before it reaches an operator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.pin_memory:
            return args[0]
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == "cuda":
            options = {name: x for name, x in kwargs.items() if name != "device"}
            numbers = tree_map(lambda x: x.item() if isinstance(x, Tensor) else x, args[0])
            return func(numbers, **options).to(device)
        return func(*args, **kwargs)


_CUDA = {
    "_lazy_init": lambda: None,
    "device_count": lambda: 1,
    "set_device": lambda device: None,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: SimpleNamespace(
        shared_memory_per_block_optin=227 * 1024
    ),
    "get_device_name": lambda device=None: "a CPU that plays CUDA",
    "is_bf16_supported": lambda *args, **kwargs: True,
    "empty_cache": lambda: None,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "manual_seed_all": lambda seed: None,
    "set_sync_debug_mode": lambda mode: _debug_mode.__setitem__(0, mode),
}


@contextmanager
def played() -> Iterator[None]:
    """Make it the process's CUDA device."""
    with ExitStack() as stack:
        for name, function in _CUDA.items():
            stack.enter_context(patch.object(torch.cuda, name, function))
        stack.enter_context(patch.object(planned, "type", _type, create=True))
        future = torch.__future__
        swaps = future.get_swap_module_params_on_conversion()
        stack.callback(future.set_swap_module_params_on_conversion, swaps)
        future.set_swap_module_params_on_conversion(True)  # or weights would be none of its tensors
        stack.enter_context(_Functions())
        stack.enter_context(_Operators())
        yield
