"""Memory over many training steps with ragged batches: whether anything grows.

    python benchmarks/soak.py [--steps 2000] [--every 50] [--out FOLDER]

A patched policy and its patched reference, a tiny decoder each. Every step has rows of other
lengths, planned by the model, by the collator, or packed there; in between come evaluations, calls
that are bypassed, generation, and now and then the patch of the reference is taken off and put on
again. What is alive is counted after a garbage collection, each time after one and the same batch:
tensors, their bytes, objects of the collector, entries of the caches, and the process's resident
memory. The command fails if there is more of the first four at the end than in the first samples.
"""

import argparse
import copy
import gc
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import psutil
import torch
from charts import line_panels
from decoder import SHAPES, build_decoder
from report import machine, results_folder, write_table
from torch._subclasses import FakeTensor
from tqdm import trange
from transformers import PreTrainedModel

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    PrefixSharing,
    completion_logps,
    enable_prefix_sharing,
    plans,
)

WARM = 4
"""Samples in which optimizer, allocator and lazily loaded modules may grow."""


class Sample(NamedTuple):
    """What was alive after so many steps; memory in MiB."""

    step: int
    resident: float
    tensors: int
    tensor_memory: float
    objects: int
    cached: int


HEADER = ("step", "resident MiB", "tensors", "MiB in tensors", "objects", "cache entries")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=2000)
    add("--every", type=int, default=50, help="steps between samples")
    add("--out", type=results_folder, help="folder for table and chart")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    samples = list(soak(args.steps, args.every))
    sizes = SHAPES["tiny"][1]
    layers, hidden = sizes["num_hidden_layers"], sizes["hidden_size"]
    note = f"{machine('cpu')}, 1 thread, policy and reference of {layers} layers and hidden size "
    note += f"{hidden}, ragged batches of 1 to 6 pairs"
    lines = {
        name: [(sample.step, sample[i]) for sample in samples]
        for i, name in enumerate(HEADER)
        if i in (1, 3, 4)
    }
    write_table(
        f"Memory over {args.steps} steps",
        HEADER,
        [tuple(sample) for sample in samples],
        args.out,
        note,
        lambda figure: line_panels(figure, lines, "steps"),
    )
    found = grown(samples)
    if found:
        raise SystemExit(f"memory grows: {'; '.join(found)}")


def grown(samples: Sequence[Sample]) -> list[str]:
    """What there is more of in each of the last samples than in any of the first; resident memory,
    which depends on the allocator, is not judged."""
    first, last = samples[: WARM + 1], samples[-WARM:]
    most = {i: max(sample[i] for sample in first) for i in (2, 3, 4, 5)}
    least = {i: min(sample[i] for sample in last) for i in most}
    return [f"{HEADER[i]} from {most[i]} to {least[i]}" for i in most if least[i] > most[i]]


def soak(steps: int, every: int) -> Iterator[Sample]:
    """Train for so many steps; a sample at the beginning and after each `every` steps."""
    rng = random.Random(0)
    policy = build_decoder("tiny", "cpu", torch.float32, head=True)
    reference = copy.deepcopy(policy).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    handles = [enable(model) for model in (policy, reference)]
    fixed = pairs_of(random.Random(1))
    for step in trange(steps + 1, unit=" steps", disable=steps < 1000):
        if step % every == 0:
            train(policy, reference, optimizer, fixed, "model")
            yield sample(step, handles)
        if step % (2 * every) == every:
            handles[1].remove()
            handles[1] = enable(reference)
        planner = ("model", "collator", "packed")[step % 3]
        train(policy, reference, optimizer, pairs_of(rng), planner)
        if step % 5 == 0:
            evaluate(policy, pairs_of(rng))


def enable(model: PreTrainedModel) -> PrefixSharing:
    return enable_prefix_sharing(model, on_bypass="ignore")


def pairs_of(rng: random.Random) -> list[dict[str, list[int]]]:
    """1 to 6 pairs, of prompts that may begin alike."""

    def draw(least: int, most: int) -> list[int]:
        return [rng.randrange(3, 500) for _ in range(rng.randint(least, most))]

    system, names = draw(0, 20), ("prompt_ids", "chosen_ids", "rejected_ids")
    lengths = ((1, 60), (1, 30), (1, 30))
    pairs = [
        {name: draw(*length) for name, length in zip(names, lengths, strict=True)}
        for _ in range(rng.randint(1, 6))
    ]
    for pair in pairs:
        pair["prompt_ids"] = system + pair["prompt_ids"]
    return pairs


def batch_of(pairs: list[dict[str, list[int]]], planner: str) -> dict[str, Any]:
    layout = "packed" if planner == "packed" else "rows"
    batch = DataCollatorWithPrefixSharing(pad_token_id=0, layout=layout)(pairs)
    if planner == "model":  # which a plan that came along would spare that work
        batch = {name: torch.tensor(x.tolist()) for name, x in batch.items()}
    return dict(batch)


def train(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    pairs: list[dict[str, list[int]]],
    planner: str,
) -> None:
    """A step of DPO, the reference between the policy's forward and its backward."""
    batch = batch_of(pairs, planner)
    logps = completion_logps(policy, batch)
    with torch.inference_mode():
        known = completion_logps(reference, batch)
    chosen, rejected = (logps - known.clone()).chunk(2)
    (-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected))).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: PreTrainedModel, pairs: list[dict[str, list[int]]]) -> None:
    """A shared call, and some that are not: with a cache, with nothing to gain, generation."""
    batch = batch_of(pairs, "model")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    model.eval()
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    model(input_ids=ids, attention_mask=mask, use_cache=True)
    model(input_ids=ids[:1, :1], use_cache=False)
    model.generate(ids[:1, :5], max_new_tokens=2, do_sample=False, pad_token_id=0)
    model.train()


def sample(step: int, handles: Sequence[PrefixSharing]) -> Sample:
    """Count what is alive."""
    gc.collect()
    objects = [x for x in gc.get_objects() if type(x) is not Sample]
    tensors = [x for x in objects if issubclass(type(x), torch.Tensor)]
    tensors = [x for x in tensors if not isinstance(x, FakeTensor)]  # of compiled graphs: no memory
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    resident = psutil.Process().memory_info().rss
    cached = sum(len(p._seen) + len(p._selections) for handle in handles for p in handle._patches)
    if plans._last is not None:
        cached += len(plans._last[1]._made)
    size = sum(storages.values()) / 2**20
    return Sample(step, resident / 2**20, len(tensors), size, len(objects), cached)


if __name__ == "__main__":
    main()
