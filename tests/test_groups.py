"""Completions of one prompt kept together in the micro-batches of GRPO and RLOO."""

import re
from types import SimpleNamespace

import pytest
import torch
from test_trl_trainers import build_group
from tiny_trainers import assert_same_training, causal_model, train

from hf_prefix_patch import enable_prefix_sharing
from hf_prefix_patch.groups import GroupedMicroBatches, group_rows, grouping_advice

# TRL and transformers announce renamed and deprecated options; they are no concern here.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# Means over a micro-batch, whose mean over a step depends on which rows are together.
BY_MICRO_BATCH = ("entropy", "kl", "low_mean", "high_mean", "region_mean", "low_min", "high_max")


def batch(*prompts):
    prompt_ids = torch.tensor([[p, p + 1] for p in prompts])
    return {
        "prompt_ids": prompt_ids,
        "advantages": torch.tensor([float(p) for p in prompts]),
        "names": [str(p) for p in prompts],
        "count": torch.tensor(4),
        "nothing": None,
    }


def test_rows_are_sorted_by_prompt():
    first, second = group_rows([batch(7, 5, 9), batch(5, 7, 7)])
    assert first["prompt_ids"].tolist() == [[5, 6], [5, 6], [7, 8]]
    assert second["prompt_ids"].tolist() == [[7, 8], [7, 8], [9, 10]]
    for got in (first, second):
        assert got["advantages"].tolist() == got["prompt_ids"][:, 0].tolist()
        assert got["names"] == [str(p) for p in got["prompt_ids"][:, 0].tolist()]
        assert (got["count"].item(), got["nothing"]) == (4, None)


@pytest.mark.parametrize(
    ("name", "values", "given"),
    [
        ("pixel_values", [torch.zeros(5, 3), torch.zeros(3, 3)], r"pixel_values holds \[5, 3\]"),
        ("num_images", [[2, 0], [1, 1]], r"num_images holds \[\[2, 0\], \[1, 1\]\]"),
        ("names", [["a"], ["b", "c"]], r"names holds \[1, 2\]"),
        ("some", [None, torch.zeros(2)], r"some holds \[None, 2\]"),
        ("other", [{"a": 1}, {"b": 2}], r"other holds \[None, None\]"),
    ],
)
def test_what_is_not_one_for_each_row_is_refused(name, values, given):
    """Images of a vision-language model, in numbers that may sum up to that of the rows."""
    batches = [batch(1, 2) | {name: values[0]}, batch(2, 1) | {name: values[1]}]
    with pytest.raises(
        ValueError, match=f"micro-batches of \\[2, 2\\] rows, but {given}, of which"
    ):
        group_rows(batches)


def test_scalars_and_one_image_a_row():
    images = {"scale": 0.5, "num_images": [1, 1]}
    first, second = group_rows([batch(1, 2) | images, batch(2, 1) | images])
    assert (first["scale"], first["num_images"]) == (0.5, [1, 1])
    assert second["prompt_ids"][:, 0].tolist() == [2, 2]


class Dealer:
    """Deals out micro-batches as GRPO does: a new generation every `steps_per_generation` steps."""

    def __init__(self, generations, steps_per_generation, accumulation):
        self.args = SimpleNamespace(
            steps_per_generation=steps_per_generation,
            gradient_accumulation_steps=accumulation,
            num_generations=2,
            per_device_train_batch_size=2,
        )
        self._buffered_inputs, self._step = None, 0
        self._generations = iter(generations)

    def _prepare_inputs(self, given):
        if given == "evaluation":
            return given
        position = self._step % self.args.steps_per_generation
        if position == 0:
            self._buffered_inputs = next(self._generations)
        return self._buffered_inputs[position]


@pytest.mark.parametrize(
    ("per_generation", "accumulation", "want"),
    [
        (4, 4, [[1, 1], [2, 2], [3, 3], [4, 4]]),
        (4, 2, [[1, 1], [2, 4], [2, 3], [3, 4]]),  # two optimizer steps: no row changes its own
        (4, 6, [[1, 1], [2, 4], [2, 3], [3, 4]]),
        (4, 8, [[1, 1], [2, 2], [3, 3], [4, 4]]),
        (1, 4, [[1, 2], [1, 4], [2, 3], [3, 4]]),
    ],
)
def test_rows_stay_in_their_optimizer_step(per_generation, accumulation, want):
    dealt = [batch(1, 2), batch(4, 1), batch(3, 2), batch(4, 3)]
    generations = [dealt[i : i + per_generation] for i in range(0, 4, per_generation)]
    dealer = Dealer(generations, per_generation, accumulation)
    grouped = GroupedMicroBatches(dealer)
    for prompts in want:
        assert grouped("evaluation") == "evaluation"
        assert sorted(grouped("training")["prompt_ids"][:, 0].tolist()) == prompts
        dealer._step += 1


def test_where_there_is_nothing_to_keep():
    plain = SimpleNamespace(args=SimpleNamespace())
    with pytest.raises(ValueError, match=r"keep_groups=True is for .* this is a SimpleNamespace"):
        GroupedMicroBatches(plain)
    assert grouping_advice(plain) is None
    with pytest.raises(ValueError, match=r"steps_per_generation=4 and .*_steps=3 no two"):
        GroupedMicroBatches(Dealer([], 4, 3))


@pytest.mark.parametrize(
    ("per_generation", "accumulation", "group", "advice"),
    [
        (1, 4, 2, None),
        (2, 2, 4, None),  # one prompt a generation
        (4, 4, 2, r"shuffles the 2 .*=4 micro-batches of 2, .*; pass keep_groups=True, or"),
        (4, 3, 2, r"; make it equal to gradient_accumulation_steps and pass keep_groups=True, or"),
    ],
)
def test_advice(per_generation, accumulation, group, advice):
    dealer = Dealer([], per_generation, accumulation)
    dealer.args.num_generations = group
    said = grouping_advice(dealer)
    if advice is None:
        assert said is None
    else:
        assert said is not None
        assert re.search(advice, said)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GRPO", {"loss_type": "dapo"}),
        ("GRPO", {"loss_type": "grpo", "num_iterations": 2, "beta": 0.1}),
        ("RLOO", {"beta": 0.1}),
    ],
)
def test_kept_together_in_a_trainer(llama, tmp_path, kind, options):
    """The same training as unpatched, on the tokens of whole groups."""
    options = {"gradient_accumulation_steps": 4, "max_steps": 2, **options}
    build = build_group(kind, tmp_path, completions=(20, 32), **options)
    want = train(build, causal_model(llama), evaluate=False)
    got = train(build, causal_model(llama), "trainer", evaluate=False, keep_groups=True)
    assert_same_training(got, want, but=BY_MICRO_BATCH)
    with pytest.warns(UserWarning, match="shuffles the 8 completions of each prompt over"):
        scattered = train(build, causal_model(llama), "trainer", evaluate=False)
    assert_same_training(scattered, want)
    assert got.handle.stats.sharing_ratio > 2.5 > scattered.handle.stats.sharing_ratio
    got.handle.remove()
    assert "_prepare_inputs" not in vars(got.trainer)


def test_a_generation_for_each_micro_batch(llama, tmp_path):
    """`steps_per_generation=1` keeps groups together without an option of ours."""
    options = {"gradient_accumulation_steps": 2, "steps_per_generation": 1}
    build = build_group("GRPO", tmp_path, completions=(20, 32), **options)
    want = train(build, causal_model(llama), evaluate=False)
    got = train(build, causal_model(llama), "trainer", evaluate=False)
    assert_same_training(got, want)
    assert (got.handle.stats.calls, got.handle.stats.bypassed.total()) == (6, 0)
    assert got.handle.stats.sharing_ratio > 2.5


def test_refused_without_a_trace(llama, tmp_path):
    trainer = build_group("GRPO", tmp_path, completions=(8, 8))(causal_model(llama))
    trainer.args.steps_per_generation, trainer.args.gradient_accumulation_steps = 4, 3
    with pytest.raises(ValueError, match="make them equal"):
        enable_prefix_sharing(trainer, keep_groups=True)
    assert not trainer.model.base_model._forward_pre_hooks
    with pytest.raises(ValueError, match="keep_groups=True needs a trainer"):
        enable_prefix_sharing(trainer.model, keep_groups=True)
