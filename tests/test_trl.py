"""TRL's `DPOTrainer`: everything it logs, shared against unpatched."""

import inspect
import re

import pytest
import torch
from batches import LayerTokens
from peft import get_peft_model
from tiny_trl import (
    assert_same_log,
    assert_same_reference,
    build_trainer,
    load,
    load_moved,
    lora_config,
    perturb,
    run_dpo,
    save_tiny_model,
)
from trl import DPOConfig, DPOTrainer

from hf_prefix_patch import DataCollatorWithPrefixSharing, enable_prefix_sharing
from hf_prefix_patch.columns import REFERENCE_LOGPS, rows_of
from hf_prefix_patch.hooks import patch_of

# TRL and transformers announce renamed and deprecated options; what they are is no concern here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # Said by reentrant checkpointing, TRL's default before 0.29, of the reference's forward.
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
]

rows = pytest.mark.needs(trl=">=0.29")  # the trainer of today, which makes rows of its data
joined = pytest.mark.needs(trl="<0.29")  # the one before, which joins prompts and completions
several = pytest.mark.needs(trl=">=0.20")

LOSSES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_pair": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
}
NEEDS = {
    "aot_pair": joined,
    "aot_unpaired": rows,
    "sft": several,
    "sigmoid_norm": rows,
    "several-losses": several,
    "forward-kl": rows,
    "pad-to-multiple": rows,
    "rpo": joined,
    "logits-to-keep": joined,
    "short-parts": joined,
}
"""Of losses and settings, the versions that have them."""

SETTINGS = {
    "several-losses": {
        "loss_type": ["sigmoid", "bco_pair", "sft"],
        "loss_weights": [0.8, 0.2, 1.0],
    },
    "ld-dpo": {"ld_alpha": 0.5},
    "wpo": {"use_weighting": True},
    "forward-kl": {"f_divergence_type": "forward_kl"},
    "js-divergence": {"f_divergence_type": "js_divergence"},
    "alpha-divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "keep-start": {"max_length": 44},
    "keep-end": {"max_length": 44, "truncation_mode": "keep_end"},
    "pad-to-multiple": {"pad_to_multiple_of": 16},
    "rpo": {"rpo_alpha": 0.5},
    "logits-to-keep": {"use_logits_to_keep": True},
    "short-parts": {"max_prompt_length": 25, "max_completion_length": 5},
    "no-checkpointing": {"gradient_checkpointing": False},
    "non-reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}
LOG_2 = 0.6931472
by_name = {name: pytest.param(name, marks=mark) for name, mark in NEEDS.items()}
NAMES = ["prefix_sharing/sharing_ratio", "prefix_sharing/packed_tokens"]
by_method = pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    experts = {
        family: save_tiny_model(root / family, family, router_aux_loss_coef=0.5)
        for family in ("mixtral", "qwen3-moe")
    }
    return {"llama": save_tiny_model(root / "llama"), **experts}


@pytest.fixture(scope="module")
def llama(paths):
    return paths["llama"]


def assert_shared(stats, calls):
    """Every policy and reference call was shared, and shared enough."""
    assert not stats.bypassed
    assert stats.calls == calls
    assert stats.packed_tokens < 0.75 * stats.padded_tokens


def assert_same_training(path, output_dir, *, lora, sharing=None, calls=None, **options):
    """Three steps, unpatched and shared: one log; returns the unpatched run."""
    want = run_dpo(load(path), output_dir, lora=lora, **options)
    sharing = sharing or ("model" if lora else "trainer")
    got = run_dpo(load(path), output_dir, lora=lora, sharing=sharing, **options)
    assert_same_log(got.log, want.log)
    assert abs(want.log[0]["rewards/margins"]) > 1e-3, "the policy equals its reference"
    accumulated = want.trainer.args.gradient_accumulation_steps
    assert_shared(got.handle.stats, calls or 2 * 3 * accumulated)
    return want


@pytest.mark.needs(trl=">=0.20")
def test_every_loss_of_the_trainer_is_listed():
    method = getattr(DPOTrainer, "_compute_loss", None) or DPOTrainer.dpo_loss
    found = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(method)))
    renamed = {"aot_pair", "aot_unpaired", "sigmoid_norm"}
    assert found | renamed == LOSSES.keys()


@by_method
@pytest.mark.parametrize("loss", [by_name.get(name, name) for name in LOSSES])
def test_loss(llama, tmp_path, loss, lora):
    assert_same_training(llama, tmp_path, lora=lora, loss_type=loss, **LOSSES[loss])


@by_method
@pytest.mark.parametrize("setting", [by_name.get(name, name) for name in SETTINGS])
def test_setting(llama, tmp_path, setting, lora):
    run = assert_same_training(llama, tmp_path, lora=lora, **SETTINGS[setting])
    longest = SETTINGS[setting].get("max_length")
    if longest is not None:
        pairs = run.trainer.train_dataset
        lengths = [[len(row.ids) for row in rows_of(pair)] for pair in pairs]
        assert any(min(pair) > longest for pair in lengths)
        assert any(pair[0] != pair[1] and max(pair) > longest for pair in lengths)


@by_method
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_auxiliary_loss_of_experts(paths, tmp_path, family, lora):
    # Else a gradient that is zero but for rounding moves its weight by the whole rate.
    run = assert_same_training(paths[family], tmp_path, lora=lora, adam_epsilon=1e-6)
    assert run.trainer.model.config.output_router_logits
    assert run.log[0]["aux_loss"] > 0.1


@by_method
def test_evaluation(llama, tmp_path, lora):
    """After training, and in the middle of it."""
    options = {"evaluate": True, "eval_strategy": "steps", "eval_steps": 1}
    evaluations = 4 * 2 * 2  # batches, policy and reference
    run = assert_same_training(llama, tmp_path, lora=lora, calls=6 + evaluations, **options)
    assert sum("eval_rewards/margins" in log for log in run.log) == 4


def test_reference_from_a_moving_average(llama, tmp_path):
    """TR-DPO: the reference model's weights change under its patch."""
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1}
    assert_same_training(llama, tmp_path, lora=False, **options)


def test_trainer_form_with_a_disabled_adapter(llama, tmp_path):
    assert_same_training(llama, tmp_path, lora=True, sharing="trainer")


@rows
def test_model_form_shares_the_policy_of_full_fine_tuning(llama, tmp_path):
    """The trainer loads its own reference model, which the model form cannot know."""
    assert_same_training(llama, tmp_path, lora=False, sharing="model", calls=3)


@joined
def test_model_form_shares_a_copied_reference_too(llama, tmp_path):
    """The trainer copies the model, patch and all; the copy counts for itself."""
    want = run_dpo(load(llama), tmp_path)
    got = run_dpo(load(llama), tmp_path, sharing="model")
    assert_same_log(got.log, want.log)
    assert_shared(got.handle.stats, 3)
    assert_shared(patch_of(got.trainer.ref_model.base_model).stats, 3)


@joined
@pytest.mark.filterwarnings("ignore:Padding-free training is enabled:UserWarning")
@by_method
def test_padding_free_rows_are_shared(llama, tmp_path, lora):
    """All rows in one, told apart by their positions."""
    options = {"lora": lora, "padding_free": True}
    want = run_dpo(load(llama), tmp_path, **options)
    got = run_dpo(load(llama), tmp_path, sharing="trainer", **options)
    assert_same_log(got.log, want.log)
    assert_shared(got.handle.stats, 6)
    assert got.handle.stats.padded_tokens == got.handle.stats.row_tokens


class FusedLoss(torch.nn.Module):
    """What TRL takes from Liger's `LigerFusedLinearDPOLoss`, which does not import without triton:
    the sigmoid loss from the hidden states that predict the labels, and no gradient for those of
    the reference."""

    def __init__(self, ignore_index, beta, **options):
        super().__init__()
        self.ignored, self.beta = ignore_index, beta

    def forward(self, weight, hidden, labels, bias, ref_input, ref_weight, ref_bias):
        logits, ref_logits = hidden @ weight.T, ref_input.detach() @ ref_weight.detach().T
        logps, ref_logps = (self.sums(x, labels).chunk(2) for x in (logits, ref_logits))
        chosen, rejected = (self.beta * (a - b) for a, b in zip(logps, ref_logps, strict=True))
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        nothing = torch.zeros(())
        return loss, (*logps, nothing, nothing, nothing, chosen, rejected)

    def sums(self, logits, labels):
        real = labels != self.ignored
        logps = logits.log_softmax(-1).gather(2, labels.where(real, 0)[..., None])[..., 0]
        return (logps * real).sum(1)


@pytest.mark.needs(trl=">=0.19,<0.29")
@by_method
@pytest.mark.parametrize("keep", [False, True])
def test_fused_loss(llama, tmp_path, monkeypatch, lora, keep):
    """The trainer calls the decoder stacks itself, and hands them an argument for the head."""
    home = "trl.trainer.dpo_trainer"
    monkeypatch.setattr(f"{home}.is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(f"{home}.LigerFusedLinearDPOLoss", FusedLoss, raising=False)
    options = {"use_liger_loss": True, "use_logits_to_keep": keep}
    assert_same_training(llama, tmp_path, lora=lora, **options)


@rows
def test_packed_rows_are_refused(llama, tmp_path):
    trainer = build_trainer(load(llama), tmp_path)
    trainer.data_collator = DataCollatorWithPrefixSharing(0, layout="packed")
    with pytest.raises(ValueError, match=r"has layout='packed', but TRL .* use layout='rows'"):
        enable_prefix_sharing(trainer)
    assert patch_of(trainer.model.base_model) is None


@joined
def test_a_collator_that_the_trainer_cannot_use_is_refused(llama, tmp_path):
    trainer = build_trainer(load(llama), tmp_path)
    trainer.data_collator = DataCollatorWithPrefixSharing(pad_token_id=0)
    with pytest.raises(ValueError, match=r"of this DPOTrainer is .* leave data_collator out"):
        enable_prefix_sharing(trainer)


@joined
def test_token_budgets_are_refused(llama, tmp_path):
    trainer = build_trainer(load(llama), tmp_path)
    with pytest.raises(ValueError, match="DPOTrainer, which has a get_train_dataloader of its own"):
        enable_prefix_sharing(trainer, max_tokens_per_batch=200)
    assert patch_of(trainer.model.base_model) is None


@rows
@pytest.mark.parametrize("sharing", ["model", "trainer"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_reference_by_ref_adapter(llama, tmp_path, sharing, reentrant):
    def wrapped():
        torch.manual_seed(0)
        model = get_peft_model(load(llama), lora_config())
        perturb(model)
        return model

    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    want = run_dpo(wrapped(), tmp_path, **options)
    got = run_dpo(wrapped(), tmp_path, sharing=sharing, **options)
    assert "ref" in got.trainer.model.peft_config
    assert abs(want.log[0]["loss"] - LOG_2) > 1e-3
    assert_same_log(got.log, want.log)
    assert_shared(got.handle.stats, 6)


@joined
@pytest.mark.parametrize("sharing", ["model", "trainer"])
def test_reference_by_a_named_adapter(llama, tmp_path, sharing):
    def wrapped():
        torch.manual_seed(0)
        model = get_peft_model(load(llama), lora_config())
        model.add_adapter("reference", lora_config())
        perturb(model)
        return model

    options = {"model_adapter_name": "default", "ref_adapter_name": "reference"}
    want = run_dpo(wrapped(), tmp_path, **options)
    got = run_dpo(wrapped(), tmp_path, sharing=sharing, **options)
    assert abs(want.log[0]["loss"] - LOG_2) > 1e-3
    assert_same_log(got.log, want.log)
    assert_shared(got.handle.stats, 6)


@by_method
def test_reference_by_a_second_model(llama, tmp_path, lora):
    """The trainer form patches both models, and takes the patch off both."""

    options = {"force_use_ref_model": True} if hasattr(DPOConfig, "force_use_ref_model") else {}
    options |= {"lora": lora}
    want = run_dpo(load(llama), tmp_path, ref_model=load_moved(llama), **options)
    got = run_dpo(load(llama), tmp_path, ref_model=load_moved(llama), sharing="trainer", **options)
    other = run_dpo(load(llama), tmp_path, lora=lora)
    assert want.log[0]["rewards/chosen"] != other.log[0]["rewards/chosen"]
    assert_same_log(got.log, want.log)
    assert_shared(got.handle.stats, 6)
    policy = got.trainer.model.get_base_model() if lora else got.trainer.model
    backbones = [policy.base_model, got.trainer.ref_model.base_model]
    assert [patch_of(backbone).stats.calls for backbone in backbones] == [3, 3]
    got.handle.remove()
    assert [patch_of(backbone) for backbone in backbones] == [None, None]
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in backbones)


@rows
@by_method
def test_precomputed_reference(llama, tmp_path, lora):
    """Enabled on the model before the trainer is built, the precomputing pass is shared too."""
    options = {"lora": lora, "precompute_ref_log_probs": True}
    want = build_trainer(load(llama), tmp_path, **options)
    model = load(llama)
    handle = enable_prefix_sharing(model)
    got = build_trainer(model, tmp_path, **options)
    assert_shared(handle.stats, 3 + 2)  # batches of the training and the evaluation pairs
    assert_same_reference(got, want)
    want.train()
    got.train()
    assert_same_log(got.state.log_history, want.state.log_history)
    assert abs(want.state.log_history[0]["rewards/margins"]) > 1e-3
    assert_shared(handle.stats, 5 + 3)


@joined
@by_method
def test_reference_precomputed_when_training_begins(llama, tmp_path, lora):
    """The trainer form is in time for it."""
    options = {"lora": lora, "precompute_ref_log_probs": True}
    want = run_dpo(load(llama), tmp_path, **options)
    got = run_dpo(load(llama), tmp_path, sharing="trainer", **options)
    for name in REFERENCE_LOGPS:
        ours, theirs = (torch.tensor(list(run.trainer.train_dataset[name])) for run in (got, want))
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)
    if lora:  # else the policy is its own reference, and its accuracies are rounding
        assert_same_log(got.log, want.log)
    assert_shared(got.handle.stats, 3 + 3)


@rows
@by_method
def test_precomputed_reference_in_the_trainer_form_warns(llama, tmp_path, lora):
    want = run_dpo(load(llama), tmp_path, lora=lora, precompute_ref_log_probs=True)
    trainer = build_trainer(load(llama), tmp_path, lora=lora, precompute_ref_log_probs=True)
    with pytest.warns(UserWarning, match=r"precompute_ref_log_probs=True computed .* before"):
        handle = enable_prefix_sharing(trainer)
    trainer.train()
    assert_same_log(trainer.state.log_history, want.log)
    assert_shared(handle.stats, 3)


@by_method
def test_bf16_autocast_is_no_worse_than_the_unpatched_trainer(llama, tmp_path, lora):
    """Error of the loss to the fp32 run at most twice the unpatched bf16 run's own error."""

    def losses(**options):
        options |= {"max_steps": 12, "per_device_train_batch_size": 2}
        run = run_dpo(load(llama), tmp_path, lora=lora, **options)
        return torch.tensor([log["loss"] for log in run.log if "loss" in log]), run.handle

    truth, _ = losses()
    unpatched, _ = losses(bf16=True)
    shared, handle = losses(bf16=True, sharing="trainer")
    assert len(truth) == 12
    assert 0 < (shared - truth).norm() <= 2 * (unpatched - truth).norm()
    assert_shared(handle.stats, 2 * 12)


@rows
@by_method
def test_log_metrics(llama, tmp_path, lora):
    """Exactly two names join each log, their values are those of the calls since the last one,
    and they go with the handle."""
    options = {"lora": lora, "gradient_checkpointing": False}
    want = run_dpo(load(llama), tmp_path, evaluate=True, **options)
    trainer = build_trainer(load(llama), tmp_path, **options)
    handle = enable_prefix_sharing(trainer, log_metrics=True)
    seen = LayerTokens(trainer.model)
    if not lora:
        LayerTokens(trainer.ref_model).shapes = seen.shapes
    trainer.train()
    trainer.evaluate()
    *steps, summary, evaluation = trainer.state.log_history
    *want_steps, want_summary, want_evaluation = want.log
    assert len(steps) == 3
    for log, want_log in zip(steps, want_steps, strict=True):
        assert log.keys() == want_log.keys() | set(NAMES)
    assert summary.keys() == want_summary.keys()
    assert evaluation.keys() == want_evaluation.keys() | {f"eval_{name}" for name in NAMES}

    assert len(seen.shapes) == 2 * (3 + 2)
    tokens = [n for _, n in seen.shapes]  # policy and reference in turn
    both = [policy + ref for policy, ref in zip(tokens[::2], tokens[1::2], strict=True)]
    logged = [log["prefix_sharing/packed_tokens"] for log in steps]
    assert logged == both[:3]
    assert evaluation["eval_prefix_sharing/packed_tokens"] == sum(both[3:])
    before = 0.0
    for log, packed in zip(steps, logged, strict=True):
        rows = 2 * (log["num_tokens"] - before)  # policy and reference
        assert log["prefix_sharing/sharing_ratio"] == pytest.approx(rows / packed)
        before = log["num_tokens"]
    rows = 2 * sum(
        2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"])
        for pair in trainer.eval_dataset
    )
    assert evaluation["eval_prefix_sharing/sharing_ratio"] == pytest.approx(rows / sum(both[3:]))

    handle.remove()
    assert trainer.evaluate().keys() == want_evaluation.keys() - {"step"}
    assert "log" not in vars(trainer)


def test_neftune_in_the_trainer_is_refused(llama, tmp_path):
    trainer = build_trainer(load(llama), tmp_path, lora=True, neftune_noise_alpha=5.0)
    with pytest.raises(NotImplementedError, match=r"neftune_noise_alpha=5.0, .* set it to None"):
        enable_prefix_sharing(trainer)
    assert patch_of(trainer.model.get_base_model().base_model) is None


def test_a_reference_that_was_enabled_by_itself(llama, tmp_path):
    """The trainer that takes it over goes on from no cache of it."""
    reference = load(llama)
    enable_prefix_sharing(reference)
    assert patch_of(reference.model).cache_by_default
    trainer = build_trainer(load(llama), tmp_path, ref_model=reference)
    with enable_prefix_sharing(trainer):
        assert not patch_of(reference.model).cache_by_default
        assert patch_of(trainer.model.model).cache_by_default
    assert patch_of(reference.model).cache_by_default
