"""A pytest plugin under which the tests marked `gpu` run on a CUDA device that the CPU plays.

`make rehearse` preloads what it needs.
"""

import pytest
import tiny_trl  # noqa: F401  (packages that look for a GPU when they are imported find none)
import torch

from played.device import played
from played.kernels import install


def pytest_configure(config):
    if torch.accelerator.current_accelerator() is None:
        raise pytest.UsageError("played.so is not preloaded; run `make rehearse`")
    torch.cuda.is_available = lambda: True  # before tests are skipped for want of one


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if item.get_closest_marker("gpu") is None:
        return (yield)
    with pytest.MonkeyPatch.context() as monkeypatch, played():
        install(monkeypatch)
        return (yield)
