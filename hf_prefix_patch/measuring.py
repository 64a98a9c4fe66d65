"""Time and peak memory of a piece of code, on any device."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _RestorePythonTLSSnapshot  # type: ignore[attr-defined]
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call, its work on the device included."""
    _wait_for(device)
    start = time.perf_counter()
    call()
    _wait_for(device)
    return time.perf_counter() - start


def peak_of(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that one call held at once, beyond what was there before.

    On CUDA this is what the allocator handed out at its highest. Elsewhere it is the sum of the
    tensors alive at once, a number that does not depend on the allocator, on other threads or on
    what ran before; scratch memory inside PyTorch's own kernels is not in it.
    """
    gc.collect()
    if device.type != "cuda":
        memory = TensorMemory()
        with memory:
            call()
        return memory.peak
    _wait_for(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    _wait_for(device)
    return torch.cuda.max_memory_allocated(device) - before


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class TensorMemory(TorchDispatchMode):
    """Bytes of the tensors that operators return and that are alive: now, and at most.

    Views and results written into given tensors take no memory of their own and count nothing. The
    operators of this package are looked into: what their Python bodies make on the way counts too.
    Scratch memory inside PyTorch's own kernels does not, shared or not.

    Examples:
        >>> x = torch.zeros(1024)
        >>> with TensorMemory() as memory:
        ...     y = (x + 1) * 2  # x + 1 is alive until the product is there
        >>> memory.now, memory.peak
        (4096, 8192)
    """

    supports_higher_order_operators = True  # flex attention is one

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._held: dict[int, int] = {}
        self._before: list[torch.UntypedStorage] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # What an operator is given and none has returned was there before: it counts nothing.
        self._note((args, kwargs), new=False)
        body = _body_of(func)
        if body is None:
            output = func(*args, **kwargs)
        else:
            # Dispatch as the operator was entered, or torch.func fails; no autograd, as inside it.
            with _RestorePythonTLSSnapshot(), torch.no_grad(), self:
                output = body(*args, **kwargs)
        self._note(output, new=True)
        return output

    def _note(self, values: Any, *, new: bool) -> None:
        for x in tree_leaves(values):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            key = storage._cdata
            if key in self._held:
                continue
            self._held[key] = storage.nbytes() if new else 0
            self.now += self._held[key]
            self.peak = max(self.peak, self.now)
            if new:
                # The Python object of a storage lives as long as the storage itself.
                weakref.finalize(storage, self._free, key)
            else:
                self._before.append(storage)  # or its key could be given to another

    def _free(self, key: int) -> None:
        self.now -= self._held.pop(key)


def _body_of(func: Any) -> Callable[..., Any] | None:
    """The Python function behind an operator of this package; None for any other operator."""
    if getattr(func, "namespace", None) != "hf_prefix_patch":
        return None
    body: Callable[..., Any] = OPDEFS[func.name()]._init_fn
    return body
