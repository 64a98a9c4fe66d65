"""Memory of the tensors that a piece of code makes, on any device, the same at every run."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Bytes of the tensors that operators return and that are alive: now, and at most.

    Views and results written into given tensors take no memory of their own and count nothing.

    Example:
        >>> x = torch.zeros(1024)
        >>> with TensorMemory() as memory:
        ...     y = (x + 1) * 2  # x + 1 is alive until the product is there
        >>> memory.now, memory.peak
        (4096, 8192)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, int] = {}
        self._before: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # What an operator is given and none has returned was there before: it counts nothing.
        self._note((args, kwargs), new=False)
        output = func(*args, **kwargs)
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
