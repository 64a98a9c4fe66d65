"""Models within modules of the user's own: stacks under a head, value heads, losses as modules."""

import copy

import pytest
import torch
from batches import LayerTokens, assert_same_run, gradients, preference_batch
from families import tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_trl import lora_config, perturb
from torch import nn
from torch.nn.functional import logsigmoid
from transformers import Trainer, TrainingArguments

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    disable_prefix_sharing,
    enable_prefix_sharing,
)
from hf_prefix_patch import completion_logps as logps_without_logits
from hf_prefix_patch.comparison import compare_sharing
from hf_prefix_patch.hooks import is_shared


class RewardModel(nn.Module):
    """A stack and a score, called with what no model of transformers takes."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.stack = stack
        self.score = nn.Linear(stack.config.hidden_size, 1)

    def forward(self, ids, mask):
        hidden = self.stack(ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = mask.sum(1) - 1
        return self.score(hidden[torch.arange(len(last)), last])[:, 0]


class ValueHead(nn.Module):
    """Values beside logits, as TRL has had them: a tuple, from the last hidden states."""

    def __init__(self, pretrained_model: nn.Module) -> None:
        super().__init__()
        self.pretrained_model = pretrained_model
        self.v_head = nn.Linear(pretrained_model.config.hidden_size, 1)

    def forward(self, input_ids=None, attention_mask=None, **options):
        options |= {"output_hidden_states": True, "use_cache": False}
        output = self.pretrained_model(input_ids, attention_mask, **options)
        return output.logits, None, self.v_head(output.hidden_states[-1])[..., 0]


def reward_model() -> tuple[nn.Module, nn.Module]:
    stack = tiny_model().base_model
    return RewardModel(stack), stack


def compiled_reward_model() -> tuple[nn.Module, nn.Module]:
    model, stack = reward_model()
    return torch.compile(model, backend="eager"), stack


def value_head() -> tuple[nn.Module, nn.Module]:
    model = get_peft_model(tiny_model(), lora_config())
    perturb(model)
    return ValueHead(model), model.get_base_model().model


def nested() -> tuple[nn.Module, nn.Module]:
    model, stack = value_head()
    return nn.Sequential(model), stack


def adapted() -> tuple[nn.Module, nn.Module]:
    """Adapters around the module, not the model in it."""
    model, stack = reward_model()
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"]))
    perturb(model)
    return model, stack


def named_twice() -> tuple[nn.Module, nn.Module]:
    """Model and stack both under names of their own."""
    causal_lm = tiny_model()
    model = RewardModel(causal_lm.model)
    model.causal_lm = causal_lm
    return model, causal_lm.model


def shared_trunk() -> tuple[nn.Module, nn.Module]:
    """Two heads, each in a module with the trunk: one decoder stack all the same."""
    causal_lm = tiny_model()
    model = RewardModel(causal_lm.model)
    model.actor, model.critic = nn.Sequential(causal_lm), nn.Sequential(causal_lm.model)
    return model, causal_lm.model


def scores_of(output, mask):
    """`[R]`: those of a reward model, or the values at the last tokens."""
    if isinstance(output, torch.Tensor):
        return output
    return output[2].gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]


def run(module, batch):
    """Scores of all rows, and gradients of a loss in which none stands for another."""
    module.zero_grad()
    given = batch.input_ids, batch.attention_mask
    called = module[0] if isinstance(module, nn.Sequential) else module
    scores = scores_of(called(*given), batch.attention_mask)
    (scores * torch.tensor([1.0, 0.4, -0.8, -0.3])).sum().backward()
    return scores.detach(), gradients(module)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "build",
    [reward_model, compiled_reward_model, value_head, nested, named_twice, shared_trunk, adapted],
)
def test_scores_and_gradients(build):
    torch.manual_seed(0)
    module, stack = build()
    batch, tokens = preference_batch(), LayerTokens(stack)
    want = run(module, batch)
    with enable_prefix_sharing(module) as sharing:
        assert is_shared(module)
        tokens.shapes.clear()
        got = run(module, batch)
    again = run(module, batch)
    assert not is_shared(module)
    assert_same_run(got, want)
    assert torch.equal(again[0], want[0])
    (packed, padded) = sharing.stats.packed_tokens, sharing.stats.padded_tokens
    assert tokens.shapes[0] == (1, packed)
    assert packed < 0.8 * padded


def test_adapters_within_are_looked_at():
    """The model in the module is the one with its adapters, not the stack in that."""
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    module = ValueHead(get_peft_model(tiny_model(), prompt))
    with pytest.raises(NotImplementedError, match="virtual tokens"):
        enable_prefix_sharing(module)


def test_verification_runs_within(monkeypatch):
    """A stack that computes something else when shared is found without a call of its module."""
    module, stack = reward_model()
    monkeypatch.setattr(
        stack.norm, "forward", lambda x: x.cumsum(1) if x.shape[0] == 1 else x, raising=True
    )
    with pytest.raises(RuntimeError, match="hidden states of LlamaModel differ"):
        enable_prefix_sharing(module)
    assert not stack._forward_hooks


class PairLoss(RewardModel):
    """What `Trainer` trains without a loss of its own."""

    def forward(self, input_ids, attention_mask, completion_mask):
        chosen, rejected = super().forward(input_ids, attention_mask).chunk(2)
        return {"loss": -logsigmoid(chosen - rejected).mean()}


def pair_trainer(model, tmp_path):
    pairs = [
        {
            "prompt_ids": [5, 6, 7, 8, 9, i],
            "chosen_ids": [3, 10 + i, 4],
            "rejected_ids": [3, 20 + i],
        }
        for i in range(4)
    ]
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, optim="sgd",
        use_cpu=True, report_to="none", remove_unused_columns=False, save_strategy="no",
    )  # fmt: skip
    return Trainer(model, args, DataCollatorWithPrefixSharing(pad_token_id=0), pairs)


def test_trainer(tmp_path):
    torch.manual_seed(0)
    model = PairLoss(tiny_model().base_model)
    want = copy.deepcopy(model)
    trainer = pair_trainer(model, tmp_path)
    sharing = enable_prefix_sharing(trainer, log_metrics=True)
    trainer.train()
    pair_trainer(want, tmp_path).train()
    for ours, theirs in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert (sharing.stats.calls, sharing.stats.bypassed) == (2, {})
    assert sharing.stats.sharing_ratio > 1.3
    disable_prefix_sharing(trainer)
    assert not is_shared(model)


def test_a_second_model_that_comes_later():
    """Which one is called is not known then, but what was enabled can be undone."""
    module, stack = reward_model()
    enable_prefix_sharing(module)
    module.other = tiny_model()
    with pytest.raises(
        TypeError, match=r"RewardModel with 2 models.* each of its models by itself"
    ):
        enable_prefix_sharing(module)
    disable_prefix_sharing(module)
    assert not stack._forward_hooks


class Decoder(nn.Module):
    """Goes on from the cache of its model, which nobody asked for by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids):
        output = self.model(ids)
        following = output.logits[:, -1:].argmax(-1)
        return self.model(following, past_key_values=output.past_key_values).logits[:, -1]


def test_a_module_beside_the_policy_is_left_alone(tmp_path):
    """Of models beside its policy a trainer reads outputs alone; what a module does is unknown."""
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(tiny_model(), args)
    trainer.judge = Decoder(tiny_model()).eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with torch.no_grad():
        want = trainer.judge(ids)
        with enable_prefix_sharing(trainer):
            assert torch.equal(trainer.judge(ids), want)
        with enable_prefix_sharing(trainer.judge), pytest.warns(UserWarning, match="by default"):
            assert torch.equal(trainer.judge(ids), want)


class ByHand(PairLoss):
    """Calls no hook of the stack."""

    def forward(self, input_ids, attention_mask, completion_mask):
        hidden = self.stack.forward(input_ids, attention_mask, use_cache=False).last_hidden_state
        chosen, rejected = self.score(hidden[:, 0])[:, 0].chunk(2)
        return {"loss": -logsigmoid(chosen - rejected).mean()}


def test_a_stack_that_is_not_called(tmp_path):
    """Nothing is shared, which no call could have counted."""
    trainer = pair_trainer(ByHand(tiny_model().base_model), tmp_path)
    said = r"stack of the ByHand .* not called in its first step"
    with enable_prefix_sharing(trainer) as sharing, pytest.warns(UserWarning, match=said):
        trainer.train()
    assert sharing.stats.calls == 0
    raising = enable_prefix_sharing(trainer, on_bypass="raise")
    with raising, pytest.raises(RuntimeError, match="call the stack itself"):
        trainer.train()
    with enable_prefix_sharing(trainer, on_bypass="ignore"):
        trainer.train()  # warnings are errors


def test_what_needs_a_model_itself_says_so():
    """A module of one's own may return anything: no logits can be read from it."""
    module, _ = value_head()
    collator = DataCollatorWithPrefixSharing(pad_token_id=0)
    batch = collator([{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}])
    for function in (logps_without_logits, compare_sharing):
        with pytest.raises(TypeError, match=r"ValueHead.* such as the model that it holds"):
            function(module, batch)
    with pytest.raises(TypeError, match=r"LlamaModel returns no logits.* with its head"):
        compare_sharing(tiny_model().base_model, batch)
