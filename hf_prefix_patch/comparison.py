"""Results and gradients of a model on a batch, shared against unshared, beside its own noise."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from math import inf
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from hf_prefix_patch.measuring import peak_of
from hf_prefix_patch.modes import evaluating, uncompiled
from hf_prefix_patch.runs import Runs, checkpointing, moved_embeddings, random_state
from hf_prefix_patch.wrappers import unwrap

Verdict = Literal["equal", "mismatch", "too noisy"]

_TIMES = 2  # the noise, that a difference may be
_BESIDE_DRAWS = 3  # runs: one that sets up, one unshared, one shared
_DRAWS = 3  # of noise
# Where those leave a difference unexplained, but by less than this many times. The gradient of a
# norm's weight, say, is decided by few entries: among hundreds of them one strays from three draws.
_DRAWS_IN_DOUBT, _DOUBT = 12, 10
# What torch.testing.assert_close allows by default: relative, and absolute. fp64 is held to fp32's:
# transformers computes norms and rotary angles in fp32.
_RTOL = {torch.float16: 1e-3, torch.bfloat16: 1.6e-2}
_RTOL_FP32, _ATOL = 1.3e-6, 1e-5


@dataclass(frozen=True)
class Difference:
    """Of shared from unshared results.

    Attributes:
        error: what it is.
        noise: what the unshared model differs from itself by.
        allowed: the most that noise explains.
    """

    error: float
    noise: float
    allowed: float

    @property
    def explained(self) -> bool:
        """Whether noise explains it; false for NaN."""
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        """Of what is allowed."""
        return self.error / self.allowed if self.error == self.error else inf


@dataclass(frozen=True)
class Comparison:
    """What `compare_sharing` found; see there for how noise is measured.

    Attributes:
        quantity: "log-probs", per completion token, in nats; or "scores" of a classifier, per row.
        dtype: the coarsest that the model computes in.
        backend: of the shared call.
        differences: absolute, of `quantity`: "chosen, max", "chosen, mean", "rejected, max" and
            "rejected, mean".
        gradients: by parameter, norm of the difference relative to that of the gradient; empty if
            none were compared.
        size: root mean square of the unshared results.
        row_tokens, padded_tokens, packed_tokens: as in `SharingStats`, of one call.
        unshared_bytes, shared_bytes: most that forward and backward held at once beyond weights and
            their gradients; see `peak_of` for what is counted on a CPU.
        unshared_seconds, shared_seconds: of forward and backward, planning included, each time;
            empty without `repeats`.
    """

    quantity: str
    dtype: str
    backend: str
    differences: dict[str, Difference]
    gradients: dict[str, Difference]
    size: float
    row_tokens: int
    padded_tokens: int
    packed_tokens: int
    unshared_bytes: int
    shared_bytes: int
    unshared_seconds: list[float]
    shared_seconds: list[float]

    @property
    def verdict(self) -> Verdict:
        """ "mismatch" if noise does not explain a difference; "too noisy" if it would explain too
        much to say anything; else "equal"."""
        if self.mismatches:
            return "mismatch"
        blind = any(x.allowed >= self.size for x in self._means)
        unjudged = bool(self.gradients) and 2 * len(self.unjudged) > len(self.gradients)
        return "too noisy" if blind or unjudged else "equal"

    @property
    def mismatches(self) -> dict[str, Difference]:
        """What differs by more than noise explains, the worst first."""
        found = {f"{self.quantity} of {name}": x for name, x in self.differences.items()}
        found |= {f"gradient of {name}": x for name, x in self.gradients.items()}
        wrong = {name: x for name, x in found.items() if not x.explained}
        return dict(sorted(wrong.items(), key=lambda item: -item[1].share))

    @property
    def unjudged(self) -> list[str]:
        """Parameters whose gradient could be missing without being noticed: all of it is noise."""
        return [name for name, x in self.gradients.items() if x.allowed >= 1]

    @property
    def worst_gradient(self) -> tuple[str, Difference] | None:
        """The parameter that comes closest to what is allowed, or is furthest beyond."""
        return max(self.gradients.items(), key=lambda item: item[1].share, default=None)

    @property
    def _means(self) -> list[Difference]:
        return [x for name, x in self.differences.items() if name.endswith("mean")]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, the verdict and the names of what differs included."""
        return asdict(self) | {"verdict": self.verdict, "mismatches": list(self.mismatches)}


def compare_sharing(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    backend: str = "auto",
    gradients: bool = True,
    repeats: int = 0,
    progress: bool = False,
) -> Comparison:
    """Run a preference batch through a model unshared and shared, and compare.

    Compared are the log-probs of every completion token (of a classifier: the scores of every row)
    and the gradients of all parameters that require one, under a loss that wants chosen rows up and
    rejected ones down, with another weight for each row.

    The yardstick is the model's own noise: the unshared model runs three times more, with each row
    alone and each input embedding moved to the next number that the dtype has, up or down at
    random; up to twelve times while a difference is unexplained, but of the size of the noise.
    Shared results may differ from unshared ones by twice what these do, and always by what
    `torch.testing.assert_close` allows for the dtype. The largest difference of a token is held
    against the largest noise, a mean against the mean noise and 1/sqrt(n) of the largest for n
    tokens, and a gradient against the noise of its own tensor or of the median one, whichever is
    larger.

    Dropout is off meanwhile. Gradients that parameters have, training flags and random state come
    back. Beside what a training step takes, one copy of the gradients is held, on the CPU.

    Args:
        model: a causal LM or sequence classifier of transformers, or a PEFT model of one, not
            patched; with the dtype, adapters and checkpointing that it is trained with.
        batch: `input_ids`, `attention_mask` and `completion_mask`, `[2 B, L]`, all chosen rows
            first, as `DataCollatorWithPrefixSharing(pad_token_id)` makes it of `B` pairs.
        backend: as in `enable_prefix_sharing`.
        gradients: compare gradients too; without, no backward is run.
        repeats: how many times both are run for the time that they take.
        progress: whether to show a progress bar, of runs.

    Raises:
        TypeError: `model` holds no transformers model.
        ValueError: a batch that is no preference batch, has images, in which no two rows share a
            token, or for which the unshared model returns NaN or infinity; a model that draws
            random numbers.
        NotImplementedError: a model, or calls of it, that cannot be shared.
        RuntimeError: the model is patched already.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_prefix_patch import DataCollatorWithPrefixSharing
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
        >>> pair = {"prompt_ids": [5, 6, 9], "chosen_ids": [7, 3, 4], "rejected_ids": [8, 9]}
        >>> batch = DataCollatorWithPrefixSharing(pad_token_id=0)([pair])
        >>> found = compare_sharing(LlamaForCausalLM(config), batch)
        >>> found.verdict, found.row_tokens, found.packed_tokens, len(found.gradients)
        ('equal', 11, 8, 21)
    """
    runs = Runs(model, batch, gradients)
    with (
        tqdm(desc="Comparing", unit=" runs", disable=not progress) as bar,
        evaluating(model),
        uncompiled(),
        runs.gradients_aside(),
        checkpointing(model) if gradients else nullcontext(),
    ):
        runs.after_run = bar.update
        bar.total = _BESIDE_DRAWS + _DRAWS + 2 * repeats
        before = random_state(runs.device)
        runs.values()  # what a first call sets up is in no figure
        if not all(map(torch.equal, before, random_state(runs.device))):
            raise ValueError(
                f"{type(unwrap(model)).__name__} draws random numbers in evaluation mode, or with "
                "gradient checkpointing, so no two runs of it are alike; leave out gradient "
                "checkpointing, or set its dropout to 0"
            )
        unshared_bytes = peak_of(runs.values, runs.device)
        unshared, held = runs.last, runs.gradients("cpu")
        if not all(bool(x.isfinite().all()) for x in (unshared, *held.values())):
            raise ValueError(
                f"the unshared model returns {runs.quantity} or gradients that are not finite for "
                "these rows, so there is nothing to compare with; try another dtype or other pairs"
            )
        with runs.shared(backend) as sharing:
            shared_bytes = peak_of(runs.values, runs.device)
            shared = (runs.last - unshared).abs()
            shared_gradients = runs.distances(held)
            stats, dtype = sharing.stats, runs.dtype
            if not stats.calls:
                raise runs.unshared_after_all(stats.bypassed)
            used = sharing.backend
        noises: list[Tensor] = []
        noise_gradients: list[dict[str, float]] = []
        draws = _DRAWS
        while len(noises) < draws:
            with moved_embeddings(unwrap(model), torch.finfo(dtype).eps, len(noises)):
                runs.values_row_by_row()
            noises.append((runs.last - unshared).abs())
            noise_gradients.append(runs.distances(held))
            differences = _of_results(shared, noises, unshared, runs.chosen, dtype)
            of_gradients = _of_gradients(shared_gradients, noise_gradients, dtype)
            doubt = 1 < max(x.share for x in (differences | of_gradients).values()) < _DOUBT
            draws = _DRAWS_IN_DOUBT if doubt else max(_DRAWS, len(noises))
            bar.total = _BESIDE_DRAWS + draws + 2 * repeats
        seconds = runs.seconds(backend, repeats)
    return Comparison(
        quantity=runs.quantity,
        dtype=str(dtype).removeprefix("torch."),
        backend=used,
        differences=differences,
        gradients=of_gradients,
        size=_size(unshared),
        row_tokens=runs.tree.row_tokens,
        padded_tokens=runs.tree.padded_tokens,
        packed_tokens=stats.packed_tokens // stats.calls,
        unshared_bytes=unshared_bytes,
        shared_bytes=shared_bytes,
        unshared_seconds=seconds[0],
        shared_seconds=seconds[1],
    )


def _of_results(
    shared: Tensor, noises: list[Tensor], unshared: Tensor, chosen: Tensor, dtype: torch.dtype
) -> dict[str, Difference]:
    """Of chosen and rejected results, against the noise of both, of which there may be few."""
    largest = max(noise.max().item() for noise in noises)
    mean = max(noise.mean().item() for noise in noises)
    least = _least(dtype, unshared.abs().max().item()), _least(dtype, _size(unshared))
    found = {}
    for name, which in (("chosen", chosen), ("rejected", ~chosen)):
        part = shared[which]
        strays = largest / len(part) ** 0.5
        allowed = max(least[0], _TIMES * largest), max(least[1], _TIMES * mean + strays)
        found[f"{name}, max"] = Difference(part.max().item(), largest, allowed[0])
        found[f"{name}, mean"] = Difference(part.mean().item(), mean, allowed[1])
    return found


def _of_gradients(
    shared: dict[str, float], noises: list[dict[str, float]], dtype: torch.dtype
) -> dict[str, Difference]:
    largest = {name: max(noise[name] for noise in noises) for name in shared}
    usual = median(largest.values()) if largest else 0.0
    least = _least(dtype, 1.0)
    return {
        name: Difference(error, largest[name], max(least, _TIMES * max(largest[name], usual)))
        for name, error in shared.items()
    }


def _least(dtype: torch.dtype, size: float) -> float:
    return _ATOL + _RTOL.get(dtype, _RTOL_FP32) * size


def _size(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
