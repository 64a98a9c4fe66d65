"""The transformers model inside what training wraps around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_prefix_patch.sharded import is_sharded
from hf_prefix_patch.support import check_peft


def unwrap(target: Any, check: bool = True, within: bool = True) -> PreTrainedModel:
    """The `PreTrainedModel` inside PEFT, DDP, FSDP, DeepSpeed and compiled wrappers.

    Args:
        check: refuse PEFT methods that cannot be shared.
        within: look for it in modules of the user's own too, such as a reward model with a stack
            and a head, or TRL's model with a value head; there has to be one alone.

    Raises:
        TypeError: there is none.
        NotImplementedError: as `check_peft`.
    """
    steps = list(_steps(target))
    if not within and _own(steps):
        raise _no_model(target)
    for step in steps if check else ():
        if _is_model(step) and getattr(step, "peft_config", None):  # or of model.add_adapter
            check_peft(step)
    return cast(PreTrainedModel, steps[-1])


def called_module(target: Any) -> Any:
    """What DDP, DeepSpeed and the like call as a module, and what compiled code stands for."""
    inner = target
    while not _is_model(inner):
        wrapped = [getattr(inner, name, None) for name in ("_orig_mod", "module")]
        found = next((x for x in wrapped if isinstance(x, nn.Module)), None)
        if found is None:
            return inner
        inner = found
    return inner


def outermost(target: Any) -> nn.Module:
    """What the user calls with rows; of `DataParallel` what is in it, as that may call copies, and
    of a module of their own the model in it, as its inputs may be anything.

    Sharded weights are in place when the outermost module is called, so that stays what it is.
    """
    steps = list(_steps(target))
    own = _own(steps)
    if own and not is_sharded(own[-1]):
        return cast(nn.Module, steps[steps.index(own[-1]) + 1])
    return cast(nn.Module, target.module if isinstance(target, nn.DataParallel) else target)


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder stack: what every trainer and head calls, whatever they do to the model."""
    stack: Any = model.base_model
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    alike = [part for part in parts if type(part.config) is type(model.config)]
    if stack is model and model.get_output_embeddings() is not None:
        # Llama 4 and Mllama: a head under whose base_model_prefix there is nothing.
        embeddings = model.get_input_embeddings()
        stack = next((x for x in parts if embeddings in x.modules()), model)
    elif stack is model and not type(model).__module__.startswith("transformers."):
        # In a model of the user's own the stack may have a name of its own.
        stack = backbone_of(alike[0]) if len(alike) == 1 else model
    return cast(PreTrainedModel, getattr(stack, "_orig_mod", stack))  # compiled: what is inside


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes; meta if it has no weights there or anywhere.

    Where weights are offloaded, between calls they are on the meta device, and accelerate's hooks
    know the other one.
    """
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    hooks: list[Any] = [getattr(module, "_hf_hook", None) for module in model.modules()]
    for hook in hooks:
        hooks += getattr(hook, "hooks", ())  # several in a row
        found = getattr(hook, "execution_device", None)
        if found is not None:
            return torch.device(found)
    return device


def _steps(target: Any) -> Iterator[Any]:
    """From what is called to the model of transformers: that, and what of PEFT and of the user's
    own is around it, the outermost first.

    Raises:
        TypeError: there is none, or several.
    """
    step: Any = called_module(target)
    while not isinstance(step, PreTrainedModel):
        yield step
        if _is_peft(step):
            mixed = not hasattr(step, "get_base_model")
            inner = step.base_model.model if mixed else step.get_base_model()
        else:
            held = _held_by(step)
            if len(held) != 1:
                raise _no_model(target, len(held))
            inner = held[0]
        step = called_module(inner)
    yield step


def _own(steps: list[Any]) -> list[nn.Module]:
    """The modules of the user's own among them."""
    return [step for step in steps if not _is_model(step)]


def _held_by(module: Any) -> list[nn.Module]:
    """The models in a module, but for parts of others among them; one of each decoder stack."""
    models = list(filter(_is_model, module.modules())) if isinstance(module, nn.Module) else []
    parts = {part for model in models for part in model.modules() if part is not model}
    whole = [model for model in models if model not in parts]
    return list({id(backbone_of(unwrap(model, check=False))): model for model in whole}.values())


def _no_model(target: Any, held: int = 1) -> TypeError:
    if isinstance(target, str):
        todo = "load it first, or run the script under `hf-prefix-patch run`, which takes paths"
    elif held > 1:
        todo = "pass each of its models by itself"
    else:
        todo = "pass one of these, such as the model that it holds"
    several = f" with {held} models" if held > 1 else ""
    return TypeError(
        f"target is {_in_words(target)}{several}, but a transformers PreTrainedModel, a wrapper of "
        f"one (PEFT, DDP, FSDP, torch.compile), a module with one or a Trainer is needed; {todo}"
    )


def _in_words(target: Any) -> str:
    if isinstance(target, str):
        return f"the string {target!r}"
    if isinstance(target, type):
        return f"the class {target.__name__}"
    return f"a {type(target).__name__}"


def _is_model(x: Any) -> bool:
    """Of transformers, or one of PEFT."""
    return isinstance(x, PreTrainedModel) or _is_peft(x)


def _is_peft(x: Any) -> bool:
    # A transformers model with `add_adapter` has the first, PeftModel and PeftMixedModel both.
    return hasattr(x, "peft_config") and hasattr(x, "disable_adapter")
