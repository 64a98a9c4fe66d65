"""Forward and backward of one preference batch, unshared or shared, any number of times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prefix_patch.bypass import advice
from hf_prefix_patch.composite import decoder_of
from hf_prefix_patch.hooks import patch_of
from hf_prefix_patch.measuring import seconds_of
from hf_prefix_patch.media import media_of
from hf_prefix_patch.patch import PrefixSharing, enable_prefix_sharing
from hf_prefix_patch.plans import NOTHING_TO_GAIN, forget
from hf_prefix_patch.support import refusal
from hf_prefix_patch.tree import PrefixTree
from hf_prefix_patch.verify import compute_precision, head_chooses_logits
from hf_prefix_patch.wrappers import backbone_of, device_of, unwrap


class Runs:
    """Forward and backward of one batch, any number of times.

    Attributes:
        device: of the model's weights.
        tree: of the batch.
        quantity: as in `Comparison`; known after the first run, as are the next two.
        last: results of the last run.
        chosen: which of the results belong to chosen rows.
        after_run: called at the end of every run.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor], gradients: bool) -> None:
        self._model = model
        self._inner = unwrap(model, within=False)
        self._backbone = backbone_of(self._inner)
        if patch_of(self._backbone) is not None:
            raise RuntimeError(
                f"{type(self._inner).__name__} is shared already, so it cannot run unshared; call "
                "disable_prefix_sharing(model) before comparing"
            )
        media = media_of(self._backbone, decoder_of(self._backbone), dict(batch))
        if media:
            raise ValueError(
                f"the batch holds {sorted(media)}, but rows are compared by their text alone; "
                "leave these out, or hold the log of a training against that of an unpatched one"
            )
        self.device = device_of(self._backbone)
        self._ids, self._mask, self._completion = _rows(batch, self.device)
        self.tree = PrefixTree.from_rows(self._ids.cpu(), self._mask.cpu())
        if self.tree.packed_tokens == self.tree.row_tokens:
            raise ValueError(
                "no two rows of the batch share a token, so comparing would prove nothing; give "
                "pairs whose chosen and rejected rows begin with the same prompt, padded on the "
                "right"
            )
        trained = self._inner.named_parameters() if gradients else ()
        self._parameters = {name: p for name, p in trained if p.requires_grad}
        pairs = len(self._ids) // 2
        # The rows of a pair, and pairs of one prompt, must not cancel out.
        self._weights = torch.linspace(1.0, 0.4, 2 * pairs, device=self.device)
        self._weights[pairs:] *= -1
        self._options: dict[str, Any] = {"use_cache": False}
        if getattr(self._inner.config, "output_router_logits", False):
            self._options["output_router_logits"] = False  # their loss is one of the whole batch
        self._chooses_logits = head_chooses_logits(self._inner, self._backbone)
        self.quantity = "log-probs"
        self.after_run: Callable[[], object] = lambda: None

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest that the model computes in, seen in its last shared call."""
        patch = patch_of(self._backbone)
        assert patch is not None
        assert patch.last is not None
        return compute_precision(self._backbone, patch.last.needs.dtype)

    def values(self) -> None:
        """Run the batch; gradients, if they are asked for, are those of this run alone."""
        self._run([slice(None)])

    def values_row_by_row(self) -> None:
        """The same with each row alone, without the padding after it."""
        self._run([slice(row, row + 1) for row in range(len(self._ids))])

    def _run(self, parts: list[slice]) -> None:
        for parameter in self._parameters.values():
            assert parameter.grad is not None
            parameter.grad.zero_()
        found = []
        for part in parts:
            with self._with_gradients():
                values, rows = self._results(part)
                if self._parameters:
                    loss = (values * self._weights[part][rows].to(values)).sum()
                    loss.backward()  # type: ignore[no-untyped-call]
            found.append((values.detach(), rows + (part.start or 0)))
        values, rows = (torch.cat(x) for x in zip(*found, strict=True))
        self.last, self.chosen = values, rows < len(self._ids) // 2
        self.after_run()

    def _with_gradients(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(bool(self._parameters))

    def _results(self, part: slice) -> tuple[Tensor, Tensor]:
        """`[C]` results of some rows, and of each which one of these it belongs to."""
        length = int(self._mask[part].any(0).nonzero().max()) + 1
        ids, mask, completion = (
            x[part, :length] for x in (self._ids, self._mask, self._completion)
        )
        # Column i of the logits predicts column i + 1.
        columns = completion[:, 1:].any(0).nonzero()[:, 0]
        kept = {"logits_to_keep": columns} if self._chooses_logits else {}
        returned = self._model(input_ids=ids, attention_mask=mask, **self._options, **kept)
        output = getattr(returned, "logits", None)
        if output is None:
            raise TypeError(
                f"{type(self._inner).__name__} returns no logits, but log-probs or scores are "
                "compared; pass the model with its head, as AutoModelForCausalLM loads it"
            )
        if output.ndim == 2:  # scores of rows
            self.quantity = "scores"
            rows = torch.arange(len(output), device=output.device)
            return output.flatten().float(), rows.repeat_interleave(output.shape[1])
        if not kept:
            output = output[:, columns]
        predicted = completion[:, 1:][:, columns].bool()
        logits = output[predicted]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = ids[:, 1:][:, columns][predicted]
        logps = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        return logps, predicted.nonzero()[:, 0]

    def gradients(self, device: str) -> dict[str, Tensor]:
        """Copies of the gradients of the last run."""
        grads = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        return {name: grad.to(device, copy=True) for name, grad in grads.items()}

    def distances(self, held: Mapping[str, Tensor]) -> dict[str, float]:
        """How far the gradients of the last run are from others, relative to the norm of these."""
        return {name: _distance(p.grad, held[name]) for name, p in self._parameters.items()}

    @contextmanager
    def gradients_aside(self) -> Iterator[None]:
        """Zeros for gradients meanwhile, so that no run allocates them."""
        aside = {name: p.grad for name, p in self._parameters.items()}
        try:
            for parameter in self._parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.grad = aside[name]

    @contextmanager
    def shared(self, backend: str) -> Iterator[PrefixSharing]:
        """The model patched, once a call has shown what its attention computes in."""
        with enable_prefix_sharing(
            self._model, backend=backend, verify=False, on_bypass="ignore"
        ) as sharing:
            with self._with_gradients():
                self._results(slice(None))
            forget()  # planning belongs to a call
            yield sharing

    def seconds(self, backend: str, repeats: int) -> tuple[list[float], list[float]]:
        """Of unshared and shared runs, in turn, so that a slow spell of the machine meets both."""
        unshared, shared = [], []
        for _ in range(repeats):
            unshared.append(seconds_of(self.values, self.device))
            with self.shared(backend):
                shared.append(seconds_of(self.values, self.device))
        return unshared, shared

    def unshared_after_all(self, bypassed: Mapping[str, int]) -> NotImplementedError:
        name = type(self._inner).__name__
        known = [reason for reason in bypassed if reason != NOTHING_TO_GAIN]
        if not known:
            why, todo = "its decoder stack was not called with these rows", "train it unpatched"
        else:
            why, todo = known[0], advice(known[0])
        return refusal(name, f"ran unshared: {why}", "a call that is not bypassed", todo)


def _rows(batch: Mapping[str, Tensor], device: torch.device) -> list[Tensor]:
    """Ids, attention and completion mask `[R, L]`, plain: planning belongs to a shared call."""
    names = ("input_ids", "attention_mask", "completion_mask")
    missing = [name for name in names if name not in batch]
    if missing:
        raise ValueError(
            f"the batch has {sorted(batch)} but no {missing[0]}; make it by "
            "DataCollatorWithPrefixSharing(pad_token_id) of tokenised pairs"
        )
    rows = [batch[name].as_subclass(Tensor).to(device) for name in names]
    shapes = {tuple(x.shape) for x in rows}
    if len(shapes) > 1 or rows[0].ndim != 2 or len(rows[0]) % 2:
        raise ValueError(
            f"the batch has tensors of the shapes {sorted(shapes)}, but they must all be [2 B, L] "
            "for B pairs, chosen rows first, then rejected ones; use layout='rows'"
        )
    rows[2] = rows[2] * rows[1]
    if not bool(rows[2][:, 1:].any(1).all()):
        raise ValueError(
            "a row of the batch has no completion token, so its completion has no log-prob; "
            "shorten its prompt or raise max_length"
        )
    return rows


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """For runs with gradients: without, layers need not checkpoint, and would stay in training.

    Layers checkpoint in training mode alone: they are in it until what is checkpointed runs, as
    they may have dropout of their own. The caller puts their training flags back.
    """
    flagged = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    layers: list[Any] = [m for m in flagged if not isinstance(m, PreTrainedModel)]
    with ExitStack() as restore:
        for layer in layers:
            checkpoint = layer._gradient_checkpointing_func
            restore.callback(setattr, layer, "_gradient_checkpointing_func", checkpoint)
            layer._gradient_checkpointing_func = partial(_checkpoint_evaluated, layer, checkpoint)
        for module in layers or flagged:  # a stack that checkpoints its layers itself
            module.training = True
        yield


def _checkpoint_evaluated(
    layer: Any, checkpoint: Any, call: Any, *args: Any, **options: Any
) -> Any:
    def run(*args: Any) -> Any:
        layer.training = False
        try:
            return call(*args)
        finally:  # for the next call, and for backward
            layer.training = True

    return checkpoint(run, *args, **options)


def random_state(device: torch.device) -> list[Tensor]:
    """Of the generators that layers on a device draw from."""
    states = [torch.random.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        of_one = () if device.type == "mps" else (device,)  # of which there is one at most
        states.append(torch.get_device_module(device).get_rng_state(*of_one))
    return states


@contextmanager
def moved_embeddings(model: nn.Module, eps: float, seed: int) -> Iterator[None]:
    """Each number of the input embeddings becomes the next one that the dtype has."""
    generator = torch.Generator().manual_seed(seed)

    def move(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator, dtype=torch.int8) * 2 - 1
        return output * (1 + eps * signs.to(output))

    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    with embeddings.register_forward_hook(move):
        yield


def _distance(gradient: Tensor | None, held: Tensor) -> float:
    assert gradient is not None
    want = held.to(gradient.device, torch.promote_types(held.dtype, torch.float32))
    size = want.norm().item()
    error = (gradient.to(want) - want).norm().item()
    return error / size if size else (inf if error else 0.0)
