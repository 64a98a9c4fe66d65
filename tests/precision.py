"""Models in double precision throughout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

TOLERANCE = 1e-11
"""What is left of rounding in doubles, with a margin of 100."""


def in_doubles(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """The model in fp64, which it keeps where its code asks for fp32: state-space scans, norms,
    rotary angles and routers do. In fp32 such layers differ from themselves by 1e-4 when a row
    moves by a column."""

    def wide(x: Any, dtype: Any) -> Any:
        return torch.float64 if x.dtype == torch.float64 and dtype is torch.float32 else dtype

    to, as_type, softmax, as_float = Tensor.to, Tensor.type, F.softmax, Tensor.float

    def widened(function: Any) -> Any:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            named = {name: wide(x, value) for name, value in kwargs.items()}
            return function(x, *(wide(x, value) for value in args), **named)

        return call

    for owner, name, function in (
        (Tensor, "to", to),
        (Tensor, "type", as_type),
        (F, "softmax", softmax),
    ):
        monkeypatch.setattr(owner, name, widened(function))
    narrow = (torch.float16, torch.bfloat16, torch.float32)
    monkeypatch.setattr(Tensor, "float", lambda x: as_float(x) if x.dtype in narrow else x.double())
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the grouped kernel takes no doubles
    return model.double()
