"""Modules in another mode for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from hf_prefix_patch.features import is_bitsandbytes


@contextmanager
def evaluating(called: nn.Module) -> Iterator[None]:
    """Evaluation mode; training flags and the state of dynamic rotary embeddings come back."""
    with ExitStack() as restore:  # each for itself, whatever interrupts it
        for module in called.modules():
            if hasattr(module, "max_seq_len_cached"):
                restore.callback(module._buffers.update, dict(module._buffers))
                restore.callback(module.__dict__.update, dict(module.__dict__))
        for module in called.modules():  # not by train(), which wrappers may make more of
            restore.callback(setattr, module, "training", module.training)
            # On some CPUs a 4-bit layer that is called in evaluation mode repacks its weights for
            # good, with a loss and for inference only. The mode changes nothing else in such a one.
            module.training = is_bitsandbytes(module)
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled code runs as it was written: what is compiled for this batch would serve no other"""
    if "torch._dynamo" not in sys.modules:
        yield
    else:  # in force once made, before it is entered: Ctrl-C must find nothing in between
        with torch.compiler.set_stance("force_eager"):
            yield
