"""Which versions of the libraries around this one are served, and what differs between them.

Versions are compared here and nowhere else. Importing this file fails where torch or transformers
is too old; TRL and PEFT, which a program may do without, are looked at when they are used.
"""

from __future__ import annotations

import re
import sys

import torch
import transformers

Release = tuple[int, int]

FLOORS: dict[str, Release] = {
    "torch": (2, 11),
    "transformers": (4, 53),
    "trl": (0, 18),
    "peft": (0, 15),
}
"""The oldest release of each that the tests run with; see docs/versions.md."""


def release(version: str) -> Release:
    """Major and minor number; a development or local build counts as the release that it names."""
    major, minor, *_ = re.findall(r"\d+", f"{version}.0")
    return int(major), int(minor)


def check_version(package: str, version: str) -> None:
    """Refuse a release below the floor.

    Raises:
        ImportError: names what is installed, what is needed and how to get it.
    """
    if release(version) < FLOORS[package]:
        floor = "{}.{}".format(*FLOORS[package])
        raise ImportError(
            f"hf_prefix_patch needs {package} {floor} or later, but {package} {version} is "
            f"installed; pip install -U '{package}>={floor}'"
        )


def check_loaded(package: str) -> None:
    """The same for a package that the program may not have imported.

    Raises:
        ImportError: as `check_version`.
    """
    module = sys.modules.get(package)
    if module is not None:
        check_version(package, module.__version__)


check_version("torch", torch.__version__)
check_version("transformers", transformers.__version__)

_TRANSFORMERS = release(transformers.__version__)

VARLEN_IS_TOLD_OF_GROUPS = release(torch.__version__) >= (2, 12)
"""Whether PyTorch's variable-length attention has to be told of grouped queries; before, it has no
such argument and takes them as they are."""

VARLEN_IS_SWITCHED_WITH_SDPA = release(torch.__version__) >= (2, 15)
"""Whether that attention raises where FlashAttention is switched off for SDPA."""

FLASH_IS_RESOLVED = _TRANSFORMERS >= (4, 55)
"""Whether transformers tells which functions serve a flash implementation, hub kernels included;
before, it imports those of the package that the implementation is named after."""

DTYPE = "dtype" if _TRANSFORMERS >= (4, 56) else "torch_dtype"
"""What from_pretrained calls the type of the weights."""

CHECKPOINT_LAYERS = (
    "activation_checkpointing_enable"
    if _TRANSFORMERS >= (5, 23)
    else "gradient_checkpointing_enable"
)
"""What switches a model's gradient checkpointing on; arguments of torch's function come first."""

QUANTIZED = (
    ("_is_quantized", "dtype")
    if _TRANSFORMERS >= (5, 0)
    else ("_pre_quantization_dtype", "_pre_quantization_dtype")
)
"""What the config of a quantised model alone has, and which of its entries is the type to compute
in."""
