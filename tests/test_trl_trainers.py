"""Every trainer of TRL whose batches share prefixes, and `transformers.Trainer` with a loss of
one's own: shared against unpatched, three steps and an evaluation."""

import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from test_support import refused_models
from tiny_trainers import (
    OFF_BY_PADDING,
    OPTIONS,
    assert_same_training,
    causal_model,
    digit_sum,
    fixed_completions,
    from_trl,
    make_trainer,
    prompts,
    reward_model,
    teacher_model,
    train,
)
from tiny_trl import preference_pairs, tiny_tokenizer
from torch.nn import functional as F

from hf_prefix_patch import (
    disable_prefix_sharing,
    enable_prefix_sharing,
    tokenize_preferences,
)
from hf_prefix_patch.hooks import is_shared, patch_of

pytestmark = [
    # TRL and transformers announce renamed and deprecated options; they are no concern here.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
    # ORPO and CPO, of an option that they set themselves.
    pytest.mark.filterwarnings("ignore:When using DPODataCollatorWithPadding"),
]

GENERATION = "key/value cache"
by_method = pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])


def pairs():
    return {"train_dataset": preference_pairs(), "eval_dataset": preference_pairs(8, seed=1)}


def triples():
    """Pairs with a gold answer of the same prompt."""

    def with_gold(data, seed):
        gold = preference_pairs(len(data), seed=seed)["chosen"]
        return data.add_column("reference", list(gold))

    return {name: with_gold(data, 7) for name, data in pairs().items()}


# Module, trainer, data, options; everything below that runs on pairs.
PAIRED = {
    "reward": ("trl", "Reward", pairs, {"center_rewards_coefficient": 0.01}),
    "orpo": ("trl.experimental.orpo", "ORPO", pairs, {}),
    "cpo": ("trl.experimental.cpo", "CPO", pairs, {"loss_type": "sigmoid"}),
    "cpo-ipo": ("trl.experimental.cpo", "CPO", pairs, {"loss_type": "ipo"}),
    "simpo": ("trl.experimental.cpo", "CPO", pairs, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "tpo": ("trl.experimental.tpo", "TPO", triples, {}),
    "tpo-l": (
        "trl.experimental.tpo",
        "TPO",
        triples,
        {"loss_type": "tpo-l", "beta": 2.0, "tpo_alpha": 0.0},
    ),
}


def model_for(name, path):
    return reward_model(path) if name == "reward" else causal_model(path)


def build_paired(name, output_dir, *, lora=False, **options):
    module, kind, data, own = PAIRED[name]
    return partial(
        make_trainer,
        module,
        kind,
        output_dir=output_dir,
        lora=lora,
        arguments=data(),
        **(own | options),
    )


def assert_packed(got, want):
    """Each call of `got` ran on fewer tokens than that of `want`, and the counters say the same."""
    stats = got.handle.stats
    assert (stats.calls, stats.bypassed.total()) == (len(want.tokens), 0)
    assert sum(want.tokens) == stats.padded_tokens
    assert sum(got.tokens) == stats.packed_tokens


@pytest.mark.parametrize(
    ("name", "form", "lora"),
    [
        *((name, "trainer", False) for name in PAIRED),
        *((name, "model", True) for name in ("reward", "orpo", "cpo", "tpo")),
        ("reward", "trainer", True),
        ("reward", "model", False),
    ],
)
def test_pairs(llama, tmp_path, name, form, lora):
    build = build_paired(name, tmp_path, lora=lora)
    want = train(build, model_for(name, llama))
    got = train(build, model_for(name, llama), form)
    assert_same_training(got, want, but=OFF_BY_PADDING.get(PAIRED[name][1], ()))
    assert_packed(got, want)
    assert got.handle.stats.sharing_ratio > (2.5 if name == "tpo" else 1.8)  # three rows, or two


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("reward", None),
        ("orpo", "ORPOTrainer makes other rows than max_tokens_per_batch counts"),
        ("cpo", "CPOTrainer makes other rows than max_tokens_per_batch counts"),
        ("tpo", "TPOTrainer makes other rows than max_tokens_per_batch counts"),
        ("kto", "so does KTOTrainer, which has a .* of its own; leave it out, sharing serves"),
        ("GRPO", "so does GRPOTrainer, which has a .* of its own; leave it out, sharing serves"),
        ("RLOO", "so does RLOOTrainer, which has a .* of its own; leave it out, sharing serves"),
    ],
)
def test_batches_by_token_budget(llama, tmp_path, name, reason):
    """As docs/trainers.md says; the trainer's own batches are shared with all of these."""
    if name == "kto":
        build = build_kto(tmp_path, 2)
    elif name in ("GRPO", "RLOO"):
        build = build_group(name, tmp_path)
    else:
        build = build_paired(name, tmp_path)
    trainer = build(model_for(name, llama))
    if reason is None:
        with enable_prefix_sharing(trainer, max_tokens_per_batch=400) as sharing:
            assert len(sharing.sampler) > 1
    else:
        with pytest.raises(ValueError, match=reason):
            enable_prefix_sharing(trainer, max_tokens_per_batch=400)


@pytest.mark.parametrize("name", ["reward", "orpo", "cpo", "tpo"])
def test_pairs_with_checkpointing(llama, tmp_path, name):
    build = build_paired(name, tmp_path, gradient_checkpointing=True)
    want = train(build, model_for(name, llama))
    got = train(build, model_for(name, llama), "trainer")
    assert_same_training(got, want, but=OFF_BY_PADDING.get(PAIRED[name][1], ()))
    assert (got.handle.stats.calls, got.handle.stats.bypassed.total()) == (5, 0)


def test_rewards_with_margins(llama, tmp_path):
    data = preference_pairs().add_column("margin", [0.1 * i for i in range(12)])
    build = partial(
        make_trainer, "trl", "Reward", output_dir=tmp_path, arguments={"train_dataset": data}
    )
    want = train(build, reward_model(llama), evaluate=False)
    got = train(build, reward_model(llama), "trainer", evaluate=False)
    assert_same_training(got, want)
    plain = train(build_paired("reward", tmp_path), reward_model(llama), evaluate=False)
    assert plain.log[0]["loss"] != want.log[0]["loss"]


def test_a_reward_model_outside_a_trainer(llama):
    """In evaluation mode and without a word of caches, as scripts call it: nobody goes on from the
    cache of a classifier."""
    model = reward_model(llama).eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
    rows = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with torch.no_grad():
        want = model(**rows).logits
        with enable_prefix_sharing(model) as sharing:
            got = model(**rows).logits
    torch.testing.assert_close(got, want)
    assert (sharing.stats.packed_tokens, sharing.stats.bypassed.total()) == (5, 0)


def unpaired(data, block):
    """Chosen completions of `block` prompts, then their rejected ones, and so on."""
    return from_trl("trl", "unpair_preference_dataset")(data, batch_size=block)


def build_kto(output_dir, block, **options):
    data = {name: unpaired(x, block) for name, x in pairs().items()}
    return partial(make_trainer, "trl", "KTO", output_dir=output_dir, arguments=data, **options)


@by_method
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto(llama, tmp_path, loss, lora):
    """Policy and reference, on completions and on mismatched completions of each batch. The two
    completions of a prompt meet, and never as each other's mismatch."""
    options = {"loss_type": loss, "train_sampling_strategy": "sequential", "lora": lora}
    build = build_kto(tmp_path, 2, **options)
    want = train(build, causal_model(llama), evaluate=not lora)
    got = train(build, causal_model(llama), "trainer", evaluate=not lora)
    assert_same_training(got, want)
    calls = (3 if lora else 3 + 4) * 2 * (2 if loss == "kto" else 1)
    assert (got.handle.stats.calls, got.handle.stats.bypassed.total()) == (calls, 0)
    assert got.handle.stats.sharing_ratio > 1.8
    assert abs(want.log[0]["rewards/chosen"]) > 1e-3
    if loss == "kto":
        for row in want.trainer.train_dataset:
            assert row["KL_completion_ids"] != row["completion_ids"]


def test_kto_as_it_unpairs_by_itself(llama, tmp_path):
    """All chosen completions come first: a prompt meets no second time, the system prompt does."""
    build = partial(make_trainer, "trl", "KTO", output_dir=tmp_path, arguments=pairs())
    want = train(build, causal_model(llama), evaluate=False)
    got = train(build, causal_model(llama), "model", evaluate=False)
    assert_same_training(got, want)
    stats = got.handle.stats
    assert (stats.calls, stats.bypassed.total()) == (2 * 3, 0)  # its reference is its own
    assert 1.1 < stats.sharing_ratio < 1.3


def build_group(
    kind, output_dir, *, module="trl", completions=None, lora=False, rewards=digit_sum, **options
):
    """Eight completions of a prompt in a batch, generated or `completions` in length."""
    own = {
        "num_generations": 8,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_completion_length": 32,
    }
    data = {
        "train_dataset": prompts(6, 61, uneven=3),
        "eval_dataset": prompts(2, 30, seed=1, uneven=3),
        "reward_funcs": rewards,
    }

    def build(model):
        trainer = make_trainer(
            module, kind, model, output_dir, lora=lora, arguments=data, **(own | options)
        )
        if completions is not None:
            fixed_completions(trainer, completions, not options.get("mask_truncated_completions"))
        return trainer

    return build


def test_grpo_has_three_times_fewer_tokens(llama, tmp_path):
    """Eight completions of 32 tokens of a prompt of 128, generated: (8 * 160) / (128 + 8 * 32)."""
    data = {"train_dataset": prompts(6, 125), "reward_funcs": digit_sum}
    build = partial(
        make_trainer,
        "trl",
        "GRPO",
        output_dir=tmp_path,
        arguments=data,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=32,
        generation_kwargs={"min_new_tokens": 32},
    )
    want = train(build, causal_model(llama), evaluate=False)
    got = train(build, causal_model(llama), "trainer", evaluate=False)
    assert_same_training(got, want)
    stats = got.handle.stats
    assert (stats.calls, stats.padded_tokens) == (3, 3 * 8 * 160)
    assert stats.padded_tokens >= 3 * stats.packed_tokens
    # At most: completions may begin alike.
    assert stats.packed_tokens <= 3 * (128 + 8 * 32)
    assert stats.bypassed == {GENERATION: 3 * 32}


@by_method
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_groups_as_generated(llama, tmp_path, kind, lora):
    """Sampled completions, of prompts of unequal length, a reference, evaluation."""
    build = build_group(kind, tmp_path, lora=lora, beta=0.1, max_completion_length=6)
    want = train(build, causal_model(llama))
    got = train(build, causal_model(llama), "trainer")
    assert_same_training(got, want)
    stats = got.handle.stats
    assert set(stats.bypassed) == {GENERATION}
    assert stats.calls >= 2 * (3 + 2)
    assert stats.sharing_ratio > 4


GROUPED = {
    **{
        loss: {"loss_type": loss}
        for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")
    },
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "iterations": {"num_iterations": 2, "beta": 0.1, "loss_type": "grpo"},
    "truncated": {"mask_truncated_completions": True, "loss_type": "grpo"},
    "quantile": {"top_entropy_quantile": 0.5},
    "checkpointing": {"gradient_checkpointing": True, "beta": 0.1},
}


@pytest.mark.parametrize("setting", GROUPED)
def test_grpo(llama, tmp_path, setting):
    build = build_group("GRPO", tmp_path, completions=(20, 32), **GROUPED[setting])
    want = train(build, causal_model(llama), evaluate=setting == "iterations")
    got = train(build, causal_model(llama), "trainer", evaluate=setting == "iterations")
    assert_same_training(got, want)
    stats = got.handle.stats
    assert not stats.bypassed
    assert stats.sharing_ratio > 2.2
    assert any(log.get("frac_reward_zero_std") == 0 for log in want.log)


def test_geometric_mean(llama, tmp_path):
    module = "trl.experimental.gmpo"
    build = build_group("GMPO", tmp_path, module=module, completions=(20, 32))
    want = train(build, causal_model(llama), evaluate=False)
    got = train(build, causal_model(llama), "trainer", evaluate=False)
    assert_same_training(got, want)
    assert not got.handle.stats.bypassed
    assert got.handle.stats.sharing_ratio > 2.5


def test_groups_in_parts(llama, tmp_path):
    """Four completions of a prompt in a forward, of one prompt at a time: each part has it once."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    build = build_group("GRPO", tmp_path, completions=(32, 32), **options)
    want = train(build, causal_model(llama), evaluate=False)
    got = train(build, causal_model(llama), "trainer", evaluate=False)
    assert_same_training(got, want)
    stats = got.handle.stats
    assert stats.calls == 6
    assert stats.row_tokens == want.log[-2]["num_tokens"]
    assert stats.sharing_ratio == pytest.approx(4 * (63 + 32) / (63 + 4 * 32), rel=0.02)


def test_reward_models_are_shared(llama, tmp_path):
    """A model among the reward functions sees whole rows, in evaluation mode and without a word of
    caches; its tokenizer is the policy's."""

    def build(model):
        own = {
            "reward_funcs": [reward_model(llama), digit_sum],
            "reward_processing_classes": [tiny_tokenizer(), None],
            "train_dataset": prompts(6, 60),
        }
        options = {"per_device_train_batch_size": 8, "num_generations": 8}
        trainer = make_trainer("trl", "GRPO", model, tmp_path, arguments=own, **options)
        fixed_completions(trainer, (8, 12))
        return trainer

    want = train(build, causal_model(llama), evaluate=False)
    got = train(build, causal_model(llama), "trainer", evaluate=False)
    assert_same_training(got, want)
    scorer = patch_of(got.trainer.reward_funcs[0].base_model)
    assert scorer.stats.calls == 3
    assert scorer.stats.sharing_ratio > 3
    assert got.handle.stats.calls == 6
    disable_prefix_sharing(got.trainer)
    assert patch_of(got.trainer.reward_funcs[0].base_model) is None


@pytest.mark.parametrize("on_bypass", ["warn", "ignore", "raise"])
def test_reward_models_that_cannot_be_shared(llama, tmp_path, on_bypass):
    """They run as they are beside a policy that is shared, and are said to."""
    encoder, _ = refused_models()["bidirectional"]
    trainer = build_group("GRPO", tmp_path, completions=(8, 12))(causal_model(llama))
    trainer.reward_funcs.append(encoder)
    backbone = trainer.model.base_model
    if on_bypass == "raise":
        with pytest.raises(NotImplementedError, match="bidirectional attention"):
            enable_prefix_sharing(trainer, on_bypass=on_bypass)
        assert patch_of(backbone) is None
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        enable_prefix_sharing(trainer, on_bypass=on_bypass)
    ours = [str(x.message) for x in said if "of the trainer runs as it is" in str(x.message)]
    assert len(ours) == (on_bypass == "warn")
    assert all("reward_funcs[1]" in x and "bidirectional attention" in x for x in ours)
    assert patch_of(backbone) is not None
    assert patch_of(encoder.base_model) is None


@pytest.mark.parametrize("enabled", [False, True])
def test_a_reward_model_that_fails_the_check(llama, tmp_path, enabled):
    """It runs as it is, also if it was enabled unchecked; named are the place and the numbers."""
    scorer = reward_model(llama)
    scorer.model.norm.register_forward_hook(lambda module, args, output: output.cumsum(1))
    if enabled:
        enable_prefix_sharing(scorer, verify=False)
    trainer = build_group("GRPO", tmp_path, completions=(8, 12))(causal_model(llama))
    trainer.reward_funcs = [digit_sum, scorer]
    with pytest.warns(UserWarning, match=r"reward_funcs\[1\] of the trainer .* differ from the"):
        enable_prefix_sharing(trainer)
    assert patch_of(scorer.base_model) is None
    assert patch_of(trainer.model.base_model) is not None


def dialogues(count, seed=0):
    data = preference_pairs(count, seed=seed)
    return Dataset.from_list([{"messages": x["prompt"] + x["chosen"]} for x in data])


def single_turns(**columns):
    """Prompts alone, with further columns of one value each."""

    def data(count, seed):
        turns = prompts(count, 30, seed=seed)
        for name, value in columns.items():
            turns = turns.add_column(name, [value] * count)
        return turns

    return {"train_dataset": data(12, 0), "eval_dataset": data(4, 1)}


def test_online_dpo(llama, tmp_path):
    """Two completions of a prompt, generated. The reference is called in evaluation mode and
    without a word of caches."""
    own = {"reward_funcs": digit_sum, **single_turns()}
    build = partial(
        make_trainer,
        "trl.experimental.online_dpo",
        "OnlineDPO",
        output_dir=tmp_path,
        arguments=own,
        max_new_tokens=8,
        max_length=128,
    )
    want = train(build, causal_model(llama), evaluate=False)
    got = train(build, causal_model(llama), "trainer", evaluate=False)
    assert_same_training(got, want, but=OFF_BY_PADDING["OnlineDPO"])
    policy, reference = got.trainer.model.base_model, got.trainer.ref_model.base_model
    for stats in (patch_of(policy).stats, patch_of(reference).stats):
        assert stats.calls == 3
        assert stats.sharing_ratio > 1.5
    assert set(got.handle.stats.bypassed) == {GENERATION}


@pytest.mark.parametrize("kind", ["SDPO", "SDFT"])
def test_self_distillation_with_groups(llama, tmp_path, kind):
    """Groups of completions for the policy, and for the teacher with other prompts."""
    own = single_turns(privileged_context="w1 w2 w3")
    build = partial(
        make_trainer,
        f"trl.experimental.{kind.lower()}",
        kind,
        output_dir=tmp_path,
        arguments=own | ({"reward_funcs": digit_sum} if kind == "SDPO" else {}),
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        num_generations=8,
        max_completion_length=8,
        distillation_topk=10,
    )
    want = train(build, causal_model(llama))
    got = train(build, causal_model(llama), "trainer")
    assert_same_training(got, want)
    assert set(got.handle.stats.bypassed) == {GENERATION}
    assert patch_of(got.trainer.teacher_model.base_model).stats.calls >= 3
    assert got.handle.stats.sharing_ratio > 2.5


TEACHERS = {
    "distillation": ("trl", "Distillation", single_turns, {"max_completion_length": 6}),
    "gkd": (
        "trl.experimental.gkd",
        "GKD",
        lambda: {"train_dataset": dialogues(12), "eval_dataset": dialogues(4, 1)},
        {"lmbda": 0.0, "remove_unused_columns": False},
    ),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers(llama, tmp_path, name):
    """One answer a prompt: little to share, but policy and teacher run on packed rows."""
    module, kind, data, options = TEACHERS[name]
    build = lambda model: make_trainer(  # noqa: E731
        module,
        kind,
        model,
        tmp_path,
        arguments={"teacher_model": teacher_model(llama), **data()},
        **options,
    )
    want = train(build, causal_model(llama))
    got = train(build, causal_model(llama), "trainer")
    assert_same_training(got, want)
    assert set(got.handle.stats.bypassed) <= {GENERATION}
    student, teacher = got.trainer.model.base_model, got.trainer.teacher_model.base_model
    assert patch_of(student).stats.calls == patch_of(teacher).stats.calls == 4
    assert got.handle.stats.packed_tokens < got.handle.stats.padded_tokens


@pytest.mark.filterwarnings("ignore:Padding-free training is enabled:UserWarning")
@pytest.mark.parametrize(
    "option", [{}, {"packing": True}, {"padding_free": True, "max_length": None}]
)
def test_supervised_fine_tuning(llama, tmp_path, option):
    """One answer a prompt: padding goes, and the system prompt is shared, by documents that TRL has
    packed into one row too."""
    build = partial(
        make_trainer,
        "trl",
        "SFT",
        output_dir=tmp_path,
        arguments={"train_dataset": dialogues(12), "eval_dataset": dialogues(4, 1)},
        **{"max_length": 128, **option},
    )
    want = train(build, causal_model(llama))
    got = train(build, causal_model(llama), "trainer")
    assert 1.1 < got.handle.stats.sharing_ratio < 1.3
    assert (got.handle.stats.calls, got.handle.stats.bypassed.total()) == (4, 0)
    assert_same_training(got, want)


class OddsTrainer(transformers.Trainer):
    """A loss of one's own on pairs: log-probs of chosen rows over those of rejected ones."""

    options: dict[str, bool] = {}  # noqa: RUF012

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        output = model(input_ids=ids, attention_mask=mask, **self.options)
        logps = output.logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        chosen, rejected = (logps * inputs["completion_mask"][:, 1:]).sum(1).chunk(2)
        loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        return (loss, output) if return_outputs else loss


def own_loop(output_dir, model, **arguments):
    collate = from_trl("trl.trainer.dpo_trainer", "DataCollatorForPreference")(pad_token_id=0)
    args = transformers.TrainingArguments(
        str(output_dir), remove_unused_columns=False, label_names=[], **(OPTIONS | arguments)
    )
    data = {name: tokenize_preferences(x, tiny_tokenizer()) for name, x in pairs().items()}
    trainer = OddsTrainer(model, args, data_collator=collate, **data)
    trainer.can_return_loss = True  # evaluation computes the loss
    return trainer


@pytest.mark.parametrize("form", ["model", "trainer"])
def test_a_loss_of_ones_own(llama, tmp_path, monkeypatch, form):
    monkeypatch.setattr(OddsTrainer, "options", {"use_cache": False})
    build = partial(own_loop, tmp_path)
    want = train(build, causal_model(llama))
    got = train(build, causal_model(llama), form)
    assert_same_training(got, want)
    assert_packed(got, want)
    assert len(got.tokens) == 3 + 2


def test_a_loss_that_does_not_speak_of_caches(llama, tmp_path):
    """Shared, as the trainer switches the config's cache off; with `use_cache=True`, evaluation
    runs as it is and says how to share it."""
    build = partial(own_loop, tmp_path)
    want = train(build, causal_model(llama))
    got = train(build, causal_model(llama), "trainer")
    assert_same_training(got, want)
    assert (got.handle.stats.calls, got.handle.stats.bypassed.total()) == (5, 0)
    build = partial(own_loop, tmp_path, use_cache=True)
    with pytest.warns(UserWarning, match="use_cache=False, or set it in the model's config"):
        got = train(build, causal_model(llama), "trainer")
    assert_same_training(got, want)
    assert got.handle.stats.calls == 3
    assert got.handle.stats.bypassed == {"key/value cache by default": 2}


def test_the_page_of_trainers_runs(llama, tmp_path, monkeypatch):
    """Its blocks one after another, with a tiny model and tiny data under the names they use."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "trainers.md").read_text()
    names = {
        "path": llama,
        "model": causal_model(llama),
        "tokenizer": tiny_tokenizer(),
        "pairs": preference_pairs(),
    }
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    ratios = []
    for block in blocks:
        names.pop("sharing", None)
        exec(block, names)
        if "sharing" in names:
            ratios.append(names["sharing"].stats.sharing_ratio)
    assert len(blocks) == 4
    assert [ratio > 1.5 for ratio in ratios] == [True, True]
    assert len(names["logps"]) == sum(map(len, names["answers"]))
    assert is_shared(names["reward"])
    assert len(names["unpaired"]) == 24
    both = names["unpaired"]["prompt"][:8]
    assert both[:4] == both[4:]
