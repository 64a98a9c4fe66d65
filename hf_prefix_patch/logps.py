"""Log-probabilities of completion tokens, without the logits of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_prefix_patch.head import linear_logps
from hf_prefix_patch.hooks import patch_of
from hf_prefix_patch.packed import LOSS_INPUTS, REFERENCE_LOGPS, is_packed
from hf_prefix_patch.wrappers import backbone_of, called_module, unwrap

_NOT_FOR_THE_MODEL = {"completion_mask", "labels", *LOSS_INPUTS, *REFERENCE_LOGPS}
_COMPARED = 4  # tokens whose log-probs are held against the model's own logits, once a head
_TOKENS_AT_ONCE = 128  # for heads that are not a plain linear layer


def completion_logps(model: nn.Module, batch: Mapping[str, Any], per_token: bool = False) -> Tensor:
    """Log-probabilities of the completion tokens of every row.

    Hidden states of prompts never meet the LM head, and logits are handled in chunks of the
    vocabulary (`linear_logps`). Gradients are those of the full computation. The model is called as
    it is, through PEFT, DDP and the like, shared if it is patched.

    Args:
        model: a causal LM of transformers or a wrapper of one.
        batch: from `DataCollatorWithPrefixSharing` in either layout, or `input_ids`,
            `attention_mask` and `completion_mask`, `[R, L]`, from another collator; a packed batch
            needs a patched model. What else it holds goes to the model.
        per_token: the log-probs of single tokens instead of their sums.

    Returns:
        fp32, `[R]`: sums over the completion tokens of a row, of which the first token of a row is
        none, as nothing predicts it. With `per_token`, `[C]`: those of all rows, one after another.

    Raises:
        TypeError: `model` holds no causal LM.
        ValueError: `batch` says nothing of completions.
        RuntimeError: a packed batch for a model that is not patched, or a model that did not call
            its LM head.
        NotImplementedError: a model that changes its logits after the LM head in a way that its
            config does not tell.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_prefix_patch import DataCollatorWithPrefixSharing, enable_prefix_sharing
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
        >>> model = LlamaForCausalLM(config)
        >>> sharing = enable_prefix_sharing(model)
        >>> collator = DataCollatorWithPrefixSharing(pad_token_id=0, layout="packed")
        >>> batch = collator([{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}])
        >>> chosen, rejected = completion_logps(model, batch).chunk(2)
        >>> chosen.shape, rejected.shape
        (torch.Size([1]), torch.Size([1]))
    """
    causal_lm = unwrap(model, check=False)
    head: Any = causal_lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"{type(causal_lm).__name__} has no LM head, but completion_logps needs a causal LM; "
            "load the model with AutoModelForCausalLM"
        )
    if is_packed(dict(batch)) and patch_of(backbone_of(causal_lm)) is None:
        raise RuntimeError(
            f"the batch is a packed row, but {type(causal_lm).__name__} does not share prefixes; "
            "call enable_prefix_sharing(model) first, or use a collator with layout='rows'"
        )
    tokens = _completion_tokens(batch)
    inputs = {name: x for name, x in batch.items() if name not in _NOT_FOR_THE_MODEL}
    if getattr(causal_lm.config, "output_router_logits", False):
        inputs.setdefault("output_router_logits", False)  # nobody sees them
    logps = _HeadCall(causal_lm, head, tokens).run(model, inputs)
    if tokens.repeated is not None:
        logps = logps.index_select(0, tokens.repeated.to(logps.device))
    if per_token:
        return logps
    lengths = tokens.lengths.to(logps.device)
    row = torch.arange(len(lengths), device=logps.device)
    row = row.repeat_interleave(lengths, output_size=len(logps))
    return logps.new_zeros(len(lengths)).index_add(0, row, logps)


class _Tokens(NamedTuple):
    """Completion tokens of a batch.

    Attributes:
        cells: `[U]`, where the hidden state that predicts each distinct one is, rows end to end.
        labels: `[U]`, the tokens.
        repeated: `[C]`, for each one, row by row, which of the `U` it is; None if `U` is `C`.
        lengths: `[R]`, how many each row has.
    """

    cells: Tensor
    labels: Tensor
    repeated: Tensor | None
    lengths: Tensor


def _completion_tokens(batch: Mapping[str, Any]) -> _Tokens:
    if all(name in batch for name in LOSS_INPUTS):
        return _Tokens(*(batch[name] for name in LOSS_INPUTS))
    if "completion_mask" not in batch or "input_ids" not in batch:
        raise ValueError(
            f"the batch has {sorted(batch)}, but needs input_ids and completion_mask [R, L], or "
            f"{list(LOSS_INPUTS)}; use DataCollatorWithPrefixSharing"
        )
    ids, mask = batch["input_ids"], batch["completion_mask"]
    if ids.shape != mask.shape:
        raise ValueError(
            f"completion_mask has shape {list(mask.shape)}, but input_ids {list(ids.shape)}; both "
            "must be the rows of one batch"
        )
    predicted = mask != 0
    predicted[:, 0] = False
    cells = predicted.flatten().nonzero()[:, 0]
    return _Tokens(cells - 1, ids.flatten()[cells], None, predicted.sum(1))


def logit_options(config: Any) -> tuple[float, float | None]:
    """What a model does to its logits after the LM head: a factor, and a soft cap or None."""
    config = config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name)), softcap
    scaling = getattr(config, "logits_scaling", None)
    return 1.0 if scaling is None else 1.0 / scaling, softcap


class _HeadCall:
    """One call of a model whose LM head sees the completion tokens alone.

    The log-probs are computed where the head is called, when wrappers have its weights in place.
    """

    def __init__(self, causal_lm: PreTrainedModel, head: nn.Module, tokens: _Tokens) -> None:
        self._name, self._head, self._tokens = type(causal_lm).__name__, head, tokens
        self._scale, self._softcap = logit_options(causal_lm.config)
        self._logps: Tensor | None = None
        self._expected: Tensor | None = None  # of the tokens that the head is given

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        called = called_module(model)
        # Compiled code was made without the hooks; the layers inside may well be compiled.
        target = called if hasattr(model, "_orig_mod") else model
        hooks = [
            self._head.register_forward_pre_hook(self._before_head),
            called.register_forward_hook(self._after_model),
        ]
        try:
            logps: Tensor = target(**inputs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return logps

    def _before_head(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        rows = hidden.flatten(0, -2)
        chosen = rows.index_select(0, self._tokens.cells.to(rows.device))
        labels = self._tokens.labels.to(rows.device)
        self._logps = _head_logps(head, chosen, labels, self._scale, self._softcap)
        few = 1 if head in _compared else _COMPARED
        if len(chosen):
            rows, self._expected = chosen, self._logps[:few].detach()
        return (rows[:few].detach().unsqueeze(0), *rest)

    def _after_model(self, called: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        if self._logps is None:
            raise RuntimeError(
                f"{self._name} did not call its LM head as a module, so completion_logps cannot "
                "compute log-probs there; take them from the model's logits"
            )
        if self._expected is not None and self._head not in _compared:
            logits = output[0] if isinstance(output, tuple) else output.logits
            self._compare(logits[0].detach(), self._expected)
            _compared.add(self._head)
        return self._logps

    def _compare(self, logits: Tensor, expected: Tensor) -> None:
        """Hold a few log-probs against the logits that the model makes of the same tokens."""
        labels = self._tokens.labels[: len(expected)].to(logits.device)
        own = logits.double().log_softmax(-1).gather(1, labels[:, None])[:, 0]
        # The rounding of a logit is that of its log-prob.
        rounding = torch.finfo(logits.dtype).eps * max(1.0, logits.abs().max().item())
        error, allowed = (own - expected.double()).abs().max().item(), max(8 * rounding, 1e-4)
        if not error <= allowed:
            raise NotImplementedError(
                f"{self._name} changes its logits after the LM head in a way that its config does "
                f"not tell (log-probs differ by {error:.1e}, rounding allows {allowed:.1e}); take "
                "log-probs from its logits"
            )


_compared: WeakSet[nn.Module] = WeakSet()  # heads whose log-probs agreed with the model's logits


def _head_logps(
    head: nn.Module, hidden: Tensor, labels: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """`[U]` log-probs of the labels, from `[U, H]` hidden states."""
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if plain and "forward" not in head.__dict__:
        options = {"scale": scale, "softcap": softcap}
        fused: Tensor = linear_logps(hidden, head.weight, head.bias, labels, **options)
        return fused

    # Quantised, offloaded or with an adapter: the module itself, over a few tokens at a time.
    def logps(hidden: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = head.forward(hidden)  # not called: its hooks lead here
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]

    pieces = zip(*(torch.split(x, _TOKENS_AT_ONCE) for x in (hidden, labels)), strict=True)
    return torch.cat([checkpoint(logps, *piece, use_reentrant=False) for piece in pieces])
