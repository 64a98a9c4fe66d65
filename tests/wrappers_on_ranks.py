"""Every wrapper on two processes: what is computed unpatched, enabled before and after wrapping.

Run by `torchrun`. Each rank saves, for every case and way of enabling, its log-probs of two steps,
the reduced gradients of both, and what the handle counted.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from batches import Batch, completion_logps, preference_batch
from composites import image_batch, tiny_composite
from families import tiny_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from varlen_emulator import install_torch_varlen, needs_half, serve

import hf_prefix_patch
from hf_prefix_patch import enable_prefix_sharing
from hf_prefix_patch.backends.varlen import TORCH_VARLEN
from hf_prefix_patch.wrappers import unwrap

WAYS = ("unpatched", "before", "after")
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def replicate(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, **options)


def shard(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    head: bool = False,
    stack: bool = False,
    root: bool = True,
) -> nn.Module:
    """FSDP2: each layer, on request LM head and decoder stack, and what is left as the root."""
    options = {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype)}
    base: Any = unwrap(model, check=False)
    layers = [m for stack in base.modules() if isinstance(stack, nn.ModuleList) for m in stack]
    parts = [*layers, *[base.lm_head] * head, *[base.model] * stack, *[model] * root]
    for part in parts:
        fully_shard(part, **options)
    return model


def shard_by_accelerate(model: nn.Module) -> nn.Module:
    """As `accelerate launch` does with examples/accelerate/fsdp2.yaml."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=True,
    )
    return fsdp2_prepare_model(accelerator, model)


def shard_fsdp1(model: nn.Module, flat: bool = False) -> nn.Module:
    layer = type(model.model.layers[0])
    return FullyShardedDataParallel(
        model,
        use_orig_params=not flat,
        device_id=torch.device("cpu"),
        auto_wrap_policy=lambda module, recurse, **_: recurse or type(module) is layer,
    )


def partition(model: nn.Module, stage: int, early: bool = False) -> nn.Module:
    """A DeepSpeed engine; `early`: weights are partitioned before sharing is enabled."""
    import deepspeed

    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {
        "train_batch_size": 2,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if early:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        return model
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    engine: nn.Module = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return engine


@dataclass
class Case:
    """One set-up of training.

    Attributes:
        wrap: what training wraps around the model.
        lora: train an adapter instead of the model.
        checkpointing: None, or whether reentrant.
        alone: rank 1 has rows that share nothing and have no padding.
        accumulate: the first batch is not reduced.
        logps: by `completion_logps` instead of logits.
        half: compute in bf16, with the backend that a GPU would have.
        early: done to the model before anything else.
        within: in a module of the user's own.
        images: a vision-language model; on rank 0 both rows of a pair have the same image, on rank
            1 no two rows have.
    """

    wrap: Callable[[nn.Module], nn.Module]
    lora: bool = False
    checkpointing: bool | None = None
    alone: bool = False
    accumulate: bool = False
    logps: bool = False
    half: bool = False
    early: Callable[[nn.Module], Any] | None = None
    within: bool = False
    images: bool = False


class Own(nn.Module):
    """A module of the user's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = model

    def forward(self, **inputs: Any) -> Any:
        return self.held(**inputs)


CASES = {
    "ddp": Case(replicate),
    "ddp-lora-checkpointing": Case(replicate, lora=True, checkpointing=True),
    "ddp-static-graph": Case(
        lambda m: replicate(m, static_graph=True), lora=True, checkpointing=False, alone=True
    ),
    "ddp-one-rank-shares": Case(replicate, alone=True),
    "ddp-no-sync": Case(replicate, alone=True, accumulate=True),
    "fsdp2": Case(shard, checkpointing=False),
    "fsdp2-lora": Case(shard, lora=True, checkpointing=False, alone=True),
    "fsdp2-one-rank-shares": Case(lambda m: shard(m, stack=True), alone=True, accumulate=True),
    "fsdp2-bf16": Case(lambda m: shard(m, torch.bfloat16), half=True),
    "fsdp2-bf16-layers": Case(lambda m: shard(m, torch.bfloat16, root=False), half=True),
    "fsdp2-logps-root-head": Case(shard, logps=True),
    "fsdp2-logps-own-head": Case(lambda m: shard(m, head=True), logps=True),
    "fsdp2-accelerate": Case(shard_by_accelerate, lora=True),
    "fsdp1": Case(shard_fsdp1, alone=True),
    "fsdp1-flat": Case(lambda m: shard_fsdp1(m, flat=True), checkpointing=False),
    "ddp-within": Case(replicate, within=True),
    "fsdp2-within": Case(shard, within=True, lora=True, checkpointing=False),
    "ddp-images": Case(replicate, images=True, lora=True),
    "fsdp2-images": Case(shard, images=True, checkpointing=False),
}
DEEPSPEED_CASES = {
    "zero2": Case(lambda m: partition(m, 2), alone=True),
    "zero3": Case(lambda m: partition(m, 3), alone=True, checkpointing=False),
    "zero3-lora": Case(lambda m: partition(m, 3), lora=True, checkpointing=True),
    "zero3-logps": Case(lambda m: partition(m, 3), logps=True),
    "zero3-partitioned-early": Case(
        lambda m: partition(m, 3), early=lambda m: partition(m, 3, early=True)
    ),
    "zero3-within": Case(lambda m: partition(m, 3), within=True),
    "zero3-images": Case(lambda m: partition(m, 3), images=True),
}


def batches_of(case: Case, rank: int) -> list[tuple[Batch, dict[str, Tensor]]]:
    """Two, each with what goes with its rows."""
    if case.images:
        shown = [(1,), (2,), (3,), (4,)] if rank else [(1,), (2,), (1,), (2,)]
        return [image_batch("llava", *shown)] * 2
    return [(batch, {}) for batch in text_batches_of(rank, case.alone)]


def text_batches_of(rank: int, alone: bool) -> list[Batch]:
    if not (alone and rank):
        return [preference_batch(seed=10 * rank + step) for step in range(2)]
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, 50, (2, 4, 11), generator=generator)
    rows[:, :, 0] = torch.arange(3, 7)
    whole = torch.ones(4, 11, dtype=torch.long)
    completion = whole.clone()
    completion[:, :6] = 0
    return [Batch(ids, whole, completion) for ids in rows]


def build(case: Case) -> nn.Module:
    model = tiny_composite("llava") if case.images else tiny_model()
    if case.lora:
        names = ["q_proj", "v_proj", "up_proj"]
        model = get_peft_model(model, LoraConfig(target_modules=names, init_lora_weights=False))
    if case.checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing})
        if case.lora and case.checkpointing:
            model.enable_input_require_grads()
    if case.early is not None:
        case.early(model)
    return Own(model) if case.within else model


def logps_of(case: Case, called: nn.Module, batch: Batch, media: dict[str, Tensor]) -> Tensor:
    inputs = {**batch.inputs, **media}
    if case.logps:
        inputs["completion_mask"] = batch.completion
        return hf_prefix_patch.completion_logps(called, inputs)
    return completion_logps(called(**inputs, use_cache=False).logits, batch)


def is_engine(called: nn.Module) -> bool:
    return hasattr(called, "zero_optimization")


def whole_gradients(called: nn.Module) -> dict[str, Tensor]:
    found = {}
    if isinstance(called, FullyShardedDataParallel) and called._use_orig_params:
        with FullyShardedDataParallel.summon_full_params(called, with_grads=True):
            return {n: p.grad.clone() for n, p in called.named_parameters() if p.grad is not None}
    if is_engine(called):
        from deepspeed.utils import safe_get_full_grad

        trained = [(n, p) for n, p in called.named_parameters() if p.requires_grad]
        return {name: safe_get_full_grad(weight).clone() for name, weight in trained}
    for name, weight in called.named_parameters():
        if weight.grad is not None:
            grad = weight.grad
            found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return found


def train(case: Case, way: str, rank: int, kernel_calls: list[Any]) -> dict[str, Any]:
    model, sharing = build(case), None
    if way == "before":
        sharing = enable_prefix_sharing(model)
    called = case.wrap(model)
    if way == "after":
        before = [(weight, weight.shape) for weight in model.parameters()]
        sharing = enable_prefix_sharing(called)
        for (old, shape), new in zip(before, model.parameters(), strict=True):
            assert old is new, "a weight was left gathered"
            assert shape == new.shape, "a weight was left gathered"
        units = [m for m in called.modules() if isinstance(m, FullyShardedDataParallel)]
        assert all(unit._handle.needs_unshard() for unit in units), "a unit was left gathered"
    seen: dict[str, Any] = {"logps": [], "gradients": []}
    kernel_calls.clear()
    for step, (batch, media) in enumerate(batches_of(case, rank)):
        waits = case.accumulate and step == 0 and hasattr(called, "no_sync")
        with called.no_sync() if waits else nullcontext():
            logps = logps_of(case, called, batch, media)
            loss = (logps * torch.linspace(1.0, -0.7, len(logps))).sum()
            if is_engine(called):
                called.backward(loss)
            else:
                loss.backward()
        seen["logps"].append(logps.detach().float())
        if not waits:
            seen["gradients"].append(whole_gradients(called))
        if is_engine(called):
            called.step()  # with a learning rate of 0
        elif not case.accumulate:
            called.zero_grad()
    if sharing is not None:
        stats = sharing.stats
        seen |= {"calls": stats.calls, "bypassed": dict(stats.bypassed)}
        seen |= {"tokens": (stats.packed_tokens, stats.padded_tokens)}
        seen["backend"] = sharing.backend
    return seen | {"kernel_calls": len(kernel_calls)}


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    distributed.init_process_group("gloo")
    rank, results = distributed.get_rank(), {}
    cases = CASES | (DEEPSPEED_CASES if HAS_DEEPSPEED else {})
    for name, case in cases.items():
        with pytest.MonkeyPatch.context() as patch:
            calls = install_torch_varlen(patch) if case.half else []
            if case.half:
                serve(patch, TORCH_VARLEN, needs_half)
            for way in WAYS:
                results[name, way] = train(case, way, rank, calls)
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
