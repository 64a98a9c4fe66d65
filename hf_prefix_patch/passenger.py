"""A tensor that travels past wrappers' hooks on the back of another one.

FSDP2 and ZeRO-3 gather the weights of a module again for its backward, when gradients reach what it
returned. What was computed from the weights beside that would find them gone. Between `board` and
`alight` it depends on what the module returned, so that its gradient takes the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Seat = list[Tensor]
"""Where the gradient of one passenger waits for that of its carrier; one for each pair of calls."""


def board(carrier: Tensor, passenger: Tensor, seat: Seat) -> Tensor:
    """`carrier`, unchanged; its gradient is dropped, and brings the passenger's instead."""
    boarded: Tensor = _Board.apply(carrier, passenger, seat)  # type: ignore[no-untyped-call]
    return boarded


def alight(carrier: Tensor, passenger: Tensor, seat: Seat) -> Tensor:
    """`passenger`, unchanged, by way of what has become of the carrier."""
    alighted: Tensor = _Alight.apply(carrier, passenger.detach(), seat)  # type: ignore[no-untyped-call]
    return alighted


class _Board(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, passenger: Tensor, seat: Seat) -> Tensor:
        ctx.seat = seat
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.seat.pop(), None


class _Alight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, passenger: Tensor, seat: Seat) -> Tensor:
        ctx.seat = seat
        ctx.like = {"size": carrier.shape, "dtype": carrier.dtype, "device": carrier.device}
        return passenger.view_as(passenger)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.seat.append(grad)
        return torch.zeros(**ctx.like), None, None
