"""Log-probabilities of completion tokens, without the logits of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from threading import RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_prefix_patch.columns import REFERENCE_LOGPS
from hf_prefix_patch.completions import CompletionTokens, completion_tokens
from hf_prefix_patch.head import linear_logps
from hf_prefix_patch.hooks import patch_of
from hf_prefix_patch.packed import LOSS_INPUTS, is_packed
from hf_prefix_patch.passenger import Seat, alight, board
from hf_prefix_patch.tree import select_tokens
from hf_prefix_patch.wrappers import backbone_of, called_module, unwrap

_NOT_FOR_THE_MODEL = {"completion_mask", "labels", *LOSS_INPUTS, *REFERENCE_LOGPS}
_COMPARED = 4  # hidden states whose logits are held against the model's own, once a head
_AMPLIFIED = 1e3  # and once more so much larger, where a soft cap shows
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
        fp32, `[R]`: sums over the completion tokens of a row. The first token of a row is none, as
        nothing predicts it, nor is padding. With `per_token`, `[C]`: those of all rows, one after
        another.

    Raises:
        TypeError: `model` holds no causal LM, or `batch` is no mapping of tensors.
        ValueError: `batch` says nothing of completions, its rows do not fit together, or the model
            was made to give its head a part of the hidden states (`logits_to_keep`).
        RuntimeError: a packed batch for a model that is not patched, or a model that did not call
            its LM head.
        NotImplementedError: a model or a hook that changes logits after the LM head in another way
            than the config is known to tell.

    Examples:
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
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch is a {type(batch).__name__}, but must be a mapping with input_ids and "
            "completion_mask; pass what DataCollatorWithPrefixSharing makes"
        )
    causal_lm = unwrap(model, check=False, within=False)
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
    tokens = completion_tokens(batch)
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


def logit_options(config: Any) -> tuple[float, float | None]:
    """What a model does to its logits after the LM head: a factor, and a soft cap or None."""
    config = config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if isinstance(getattr(config, name, None), int | float):
            return float(getattr(config, name)), softcap
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0, softcap
    # Granite divides by it.
    return (scaling if config.model_type == "hyperclovax" else 1.0 / scaling), softcap


def _changed(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """What the model makes of its head's logits, as `logit_options` tells."""
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _HeadCall:
    """One call of a model whose LM head sees the completion tokens alone.

    The log-probs are computed where the head is called, when wrappers have its weights in place. By
    what a head returns wrappers know when backward needs the weights again (FSDP2, ZeRO-3), so the
    log-probs go past their hooks with it: they board it in the first hook, and alight in the last.
    """

    def __init__(
        self, causal_lm: PreTrainedModel, head: nn.Module, tokens: CompletionTokens
    ) -> None:
        self._name, self._head, self._tokens = type(causal_lm).__name__, head, tokens
        self._options = logit_options(causal_lm.config)
        self._cells = 0  # hidden states of the call
        self._logps: Tensor | None = None
        self._seat: Seat = []
        self._raw: Tensor | None = None  # what the head made of the few that it was given

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        called, self._cells = called_module(model), inputs["input_ids"].numel()
        head, mine = self._head, _in_this_thread
        # Compiled code was made without the hooks; the layers inside may well be compiled.
        target = getattr(model, "_orig_mod", model)
        way = _way_to(head, target)
        with _locks.setdefault(head, RLock()), ExitStack() as hooks:
            self._state = self._options, *(tuple(module._forward_hooks) for module in way)
            for module in way:
                compiled = module._compiled_call_impl  # in place (`model.compile()`)
                if compiled is not None:
                    hooks.callback(setattr, module, "_compiled_call_impl", compiled)
                    module._compiled_call_impl = None
            until_then = hooks.enter_context
            until_then(head.register_forward_pre_hook(mine(self._before_head)))
            until_then(head.register_forward_hook(mine(self._first_after_head), prepend=True))
            until_then(head.register_forward_hook(mine(self._last_after_head)))
            until_then(called.register_forward_hook(mine(self._after_model)))
            logps: Tensor = target(**inputs, use_cache=False)
        if self._logps is None:  # it ran in threads of its own
            raise self._no_head_call()
        return logps

    def _before_head(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        rows = hidden.flatten(0, -2)
        if len(rows) != self._cells or self._logps is not None:
            raise ValueError(
                f"{self._name} gave its LM head {len(rows)} hidden states of {self._cells} tokens, "
                "or called it again, but completion_logps needs them all at once; leave out "
                "logits_to_keep, or take log-probs from the model's logits"
            )
        chosen = select_tokens(rows, self._tokens.cells)
        labels = self._tokens.labels.to(rows.device)
        self._logps = _head_logps(head, chosen, labels, *self._options)
        few = rows[:1].detach()
        if self._unknown:
            few = (chosen if len(chosen) else rows)[:_COMPARED].detach()
            few = torch.cat([few, few * _AMPLIFIED])
        return (few.unsqueeze(0), *rest)

    @property
    def _unknown(self) -> bool:
        """Whether the head's logits have not been compared with the model's, as hooks make them
        now."""
        return _compared.get(self._head) != self._state

    def _first_after_head(self, head: nn.Module, args: Any, output: Tensor) -> Tensor:
        assert self._logps is not None
        self._raw = output.detach().clone()  # what comes next may write into it
        return board(output, self._logps, self._seat)

    def _last_after_head(self, head: nn.Module, args: Any, output: Tensor) -> None:
        assert self._logps is not None
        self._logps = alight(output, self._logps, self._seat)

    def _after_model(self, called: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        if self._logps is None or self._raw is None:
            raise self._no_head_call()
        if self._unknown:
            logits = output[0] if isinstance(output, tuple) else output.logits
            self._compare(logits.detach().cpu(), self._raw.cpu())
            _compared[self._head] = self._state
        return self._logps

    def _no_head_call(self) -> RuntimeError:
        return RuntimeError(
            f"{self._name} did not call its LM head as a module, so completion_logps cannot "
            "compute log-probs there; take them from the model's logits"
        )

    def _compare(self, logits: Tensor, raw: Tensor) -> None:
        """Hold the model's own logits against what `linear_logps` makes of those of the head, both
        on the host: not every device has fp64."""
        scale, softcap = self._options
        finite = raw.isfinite()  # amplified, some overflow in fp16
        known = _changed(raw.double().masked_fill(~finite, 0.0), scale, softcap)
        # Each token by its own largest logit: rounding in the dtype of the head.
        size = known.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(raw.dtype).tiny)
        error = ((logits.double() - known).abs() / size).masked_fill(~finite, 0.0).max().item()
        eps = max(torch.finfo(x.dtype).eps for x in (raw, logits))  # hooks and wrappers may cast
        if not error <= 8 * eps:
            raise NotImplementedError(
                f"{self._name} changes its logits after the LM head in another way than its config "
                f"is known to tell, or a hook does (they differ by {error:.1e} of the largest from "
                f"factor {scale}, soft cap {softcap}); take log-probs from its logits"
            )


def _in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook for the calls that this thread makes: another may be using the model's logits."""
    thread = get_ident()
    return lambda *args: hook(*args) if get_ident() == thread else None


def _way_to(head: nn.Module, target: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that the head is in, from the one that is called on, and the head."""
    ways: list[tuple[nn.Module, ...]] = [(target,)]
    for way in ways:  # they become more: breadth first, as a head is near the top
        if way[-1] is head:
            return way
        ways += [(*way, child) for child in way[-1].children()]
    return target, head


_compared: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # two threads may run one model


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
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = _changed(logits, scale, softcap)
        return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]

    pieces = zip(*(torch.split(x, _TOKENS_AT_ONCE) for x in (hidden, labels)), strict=True)
    return torch.cat([checkpoint(logps, *piece, use_reentrant=False) for piece in pieces])
