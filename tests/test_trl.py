"""TRL's `DPOTrainer`: everything it logs, shared against unpatched."""

import inspect
import re

import pytest
import torch
from batches import LayerTokens
from peft import get_peft_model
from tiny_trl import (
    assert_same_log,
    build_trainer,
    load,
    lora_config,
    perturb,
    run_dpo,
    save_tiny_model,
)
from trl import DPOTrainer

from hf_prefix_patch import enable_prefix_sharing
from hf_prefix_patch.hooks import patch_of

# TRL and transformers announce renamed and deprecated options; what they are is no concern here.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

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
    "aot_unpaired": {"label_smoothing": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
}
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
    "no-checkpointing": {"gradient_checkpointing": False},
    "non-reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}
LOG_2 = 0.6931472
NAMES = ["prefix_sharing/sharing_ratio", "prefix_sharing/packed_tokens"]
by_method = pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {f: save_tiny_model(root / f, f) for f in ("llama", "mixtral", "qwen3-moe")}


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


def test_every_loss_of_the_trainer_is_listed():
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == LOSSES.keys()


@by_method
@pytest.mark.parametrize("loss", LOSSES)
def test_loss(llama, tmp_path, loss, lora):
    assert_same_training(llama, tmp_path, lora=lora, loss_type=[loss], **LOSSES[loss])


@by_method
@pytest.mark.parametrize("setting", SETTINGS)
def test_setting(llama, tmp_path, setting, lora):
    run = assert_same_training(llama, tmp_path, lora=lora, **SETTINGS[setting])
    longest = SETTINGS[setting].get("max_length")
    if longest is not None:
        pairs = run.trainer.train_dataset
        lengths = [
            (len(p["prompt_ids"] + p["chosen_ids"]), len(p["prompt_ids"] + p["rejected_ids"]))
            for p in pairs
        ]
        assert any(min(pair) > longest for pair in lengths)
        assert any(pair[0] != pair[1] and max(pair) > longest for pair in lengths)


@by_method
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_auxiliary_loss_of_experts(paths, tmp_path, family, lora):
    run = assert_same_training(
        paths[family], tmp_path, lora=lora, router_aux_loss_coef=0.5, loss_type=["sigmoid"]
    )
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


def test_model_form_shares_the_policy_of_full_fine_tuning(llama, tmp_path):
    """The trainer loads its own reference model, which the model form cannot know."""
    assert_same_training(llama, tmp_path, lora=False, sharing="model", calls=3)


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


@by_method
def test_reference_by_a_second_model(llama, tmp_path, lora):
    """The trainer form patches both models, and takes the patch off both."""

    def second():
        model = load(llama)
        perturb(model, 0.1)
        return model

    want = run_dpo(load(llama), tmp_path, lora=lora, ref_model=second())
    got = run_dpo(load(llama), tmp_path, lora=lora, ref_model=second(), sharing="trainer")
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


@by_method
def test_precomputed_reference(llama, tmp_path, lora):
    """Enabled on the model before the trainer is built, the precomputing pass is shared too."""
    options = {"lora": lora, "precompute_ref_log_probs": True}
    want = build_trainer(load(llama), tmp_path, **options)
    model = load(llama)
    handle = enable_prefix_sharing(model)
    got = build_trainer(model, tmp_path, **options)
    assert_shared(handle.stats, 3 + 2)  # batches of the training and the evaluation pairs
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        ours, theirs = (torch.tensor(list(t.train_dataset[name])) for t in (got, want))
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)
    want.train()
    got.train()
    assert_same_log(got.state.log_history, want.state.log_history)
    assert abs(want.state.log_history[0]["rewards/margins"]) > 1e-3
    assert_shared(handle.stats, 5 + 3)


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
