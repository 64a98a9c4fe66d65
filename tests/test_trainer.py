"""The metrics log around a trainer's own."""

from types import SimpleNamespace

from families import tiny_model
from transformers import LlamaForSequenceClassification

from hf_prefix_patch import SharingStats
from hf_prefix_patch.callbacks import MetricsLog
from hf_prefix_patch.trainer import TrainerPatch, other_models_of


def test_a_log_of_the_users_own_is_called_and_put_back():
    said = []
    callbacks = []
    trainer = SimpleNamespace(
        log=said.append,
        model=SimpleNamespace(training=True),
        data_collator=list,
        callback_handler=SimpleNamespace(callbacks=callbacks),
        add_callback=callbacks.append,
    )
    attributes = set(vars(trainer))
    theirs, handle = trainer.log, SimpleNamespace(stats=SharingStats(100, 100, 70, 1))
    patch = TrainerPatch(
        trainer, handle, "warn", log_metrics=True, max_tokens=None, sampler_options={}
    )
    handle.stats += SharingStats(6, 8, 4, 1)
    trainer.log({"loss": 1.0})
    trainer.log({"loss": 0.5})  # no call since the last log
    assert said == [
        {"loss": 1.0, "prefix_sharing/sharing_ratio": 1.5, "prefix_sharing/packed_tokens": 4},
        {"loss": 0.5},
    ]
    patch.remove()
    assert trainer.log is theirs
    assert vars(trainer).keys() == attributes
    assert not trainer.callback_handler.callbacks


def test_training_and_evaluation_are_counted_apart_and_what_is_neither_not_at_all():
    said = []
    trainer = SimpleNamespace(log=said.append, model=SimpleNamespace(training=True))
    handle = SimpleNamespace(stats=SharingStats(100, 100, 70, 1))
    metrics = MetricsLog(trainer, handle)
    handle.stats += SharingStats(50, 50, 9, 1)
    metrics.on_train_begin(None, None, None)  # after the reference was precomputed
    handle.stats += SharingStats(6, 8, 4, 1)
    metrics.on_step_end(None, None, None)
    handle.stats += SharingStats(9, 9, 6, 1)
    trainer.model.training = False
    metrics.log({})
    handle.stats += SharingStats(80, 80, 2, 1)
    metrics.on_predict(None, None, None, {})
    trainer.model.training = True
    handle.stats += SharingStats(4, 4, 4, 1)
    metrics.on_step_end(None, None, None)
    metrics.log({})
    names = ("prefix_sharing/sharing_ratio", "prefix_sharing/packed_tokens")
    assert said == [
        {f"eval_{name}": x for name, x in zip(names, (1.5, 6), strict=True)},
        dict(zip(names, (1.25, 8), strict=True)),
    ]


def test_two_heads_on_one_stack_are_one_model():
    """A reward model on the policy's stack: one patch, options of the policy, counted once."""
    policy = tiny_model()
    reward = LlamaForSequenceClassification(policy.config)
    reward.model = policy.model
    trainer = SimpleNamespace(model=policy, ref_model=tiny_model(), reward_funcs=[len, reward])
    assert list(other_models_of(trainer, policy)) == [("ref_model", trainer.ref_model)]
