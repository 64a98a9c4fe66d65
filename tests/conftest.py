import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TextIO

import pytest
import torch
from hypothesis import HealthCheck, settings
from packaging.specifiers import SpecifierSet

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent))

from families import NEEDS

# The same batches in every run, and many others in the long one (docs/correctness.md).
# How long an example takes says nothing on a busy machine, or while coverage is measured.
any_speed = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=100, derandomize=True, **any_speed)
settings.register_profile("long", max_examples=10_000, **any_speed)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone, for wrappers that want one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def pipe_without_reader() -> Iterator[TextIO]:
    """Closed in the end, as standard output is when Python ends."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        yield pipe


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model and its tokenizer."""
    from tiny_trl import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of benchmarks/."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


def pytest_collection_finish() -> None:
    # Every training run collects garbage; this spares it what the imports have left.
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reasons = list(_missing(item))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            reasons.append("needs a CUDA device")
        if reasons:
            item.add_marker(pytest.mark.skip(reason="; ".join(reasons)))


def _missing(item: pytest.Item) -> Iterator[str]:
    """What a test asks for by `@pytest.mark.needs(trl=">=0.29")`, or by a parameter `family`, and
    the installed versions do not have."""
    asked = [marker.kwargs for marker in item.iter_markers("needs")]
    callspec = getattr(item, "callspec", None)
    asked.append(NEEDS.get(callspec.params.get("family"), {}) if callspec else {})
    for needs in asked:
        for package, wanted in needs.items():
            if not SpecifierSet(wanted).contains(version(package), prereleases=True):
                yield f"needs {package}{wanted}, and this is {version(package)}"
