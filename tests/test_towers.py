"""Towers run once on images that a batch holds several times."""

import copy
import pickle
from dataclasses import dataclass
from threading import Thread

import pytest
import torch
from batches import assert_same_run, run
from composites import image_batch, tiny_composite
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._pytree import tree_flatten
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_prefix_patch import enable_prefix_sharing
from hf_prefix_patch.towers import Towers, repeat

FAMILIES = {
    # Where the tower is, and entries of one image in its first argument.
    "qwen2.5-vl": ("visual", 16),
    "qwen3-vl-moe": ("visual", 16),
    "qwen3.5": ("visual", 16),
    "llava": ("vision_tower", 1),
    "smolvlm": ("vision_model", 1),
    "mistral3": ("vision_tower", 1),
    "voxtral": ("audio_tower", 1),
    "gemma3": ("vision_tower", 1),
}


def tower_of(model, family):
    inner = getattr(model, "base_model", model)
    return getattr(inner, FAMILIES[family][0])


class Entries:
    """Images that a tower was run on, a number a call."""

    def __init__(self, tower, entries=1):
        self.seen = []
        self._entries = entries
        tower.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        self.seen.append(len(first) // self._entries)


@pytest.mark.parametrize("mode", [None, False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_runs_on_one_of_two_images(family, mode):
    """With its gradients, and both kinds of checkpointing; Gemma3's too, whose decoder does not
    share images."""
    model = tiny_composite(family)
    if mode is not None:
        model.gradient_checkpointing_enable({"use_reentrant": mode})
        model.enable_input_require_grads()
    batch, media = image_batch(family)
    want = run(model, batch, **media)
    with enable_prefix_sharing(model, on_bypass="ignore"):
        entries = Entries(tower_of(model, family), FAMILIES[family][1])
        for _ in range(3):
            assert_same_run(run(model, batch, **media), want, of_model=True)
    assert entries.seen == [2, 1, 1]  # from the first call it is learnt how


def test_two_pairs():
    model = tiny_composite("qwen2.5-vl")
    batch, media = image_batch("qwen2.5-vl", (0,), (1, 2), (0,), (1, 2))
    alike, same = image_batch("qwen2.5-vl", (0,), (0,), (0,), (0,))
    apart, other = image_batch("qwen2.5-vl", (0,), (1,), (2,), (3,))
    want = [run(model, batch, **media), run(model, alike, **same), run(model, apart, **other)]
    with enable_prefix_sharing(model):
        entries = Entries(model.model.visual, 16)
        for _ in range(2):
            assert_same_run(run(model, batch, **media), want[0], of_model=True)
        assert_same_run(run(model, alike, **same), want[1], of_model=True)
        assert_same_run(run(model, apart, **other), want[2], of_model=True)
    assert entries.seen == [6, 3, 1, 4]


def test_adapters():
    targets = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny_composite("llava"), targets)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch, media = image_batch("llava")
    want = run(model, batch, **media)
    with enable_prefix_sharing(model):
        for _ in range(2):
            got = run(model, batch, **media)
            assert_same_run(got, want, of_model=True)
    assert any("vision_tower" in name for name in got[1])


def test_bypassed_calls_leave_towers_alone():
    model = tiny_composite("llava")
    batch, media = image_batch("llava")
    want = model(**batch.inputs, **media, use_cache=True).logits
    with enable_prefix_sharing(model, on_bypass="ignore") as sharing:
        for _ in range(2):
            run(model, batch, **media)
        entries = Entries(model.model.vision_tower)
        assert torch.equal(model(**batch.inputs, **media, use_cache=True).logits, want)
        model.get_image_features(**media)
        assert (entries.seen, sharing.stats.calls) == ([2, 2], 2)


def test_copies_and_removal():
    model = tiny_composite("llava")
    batch, media = image_batch("llava")
    sharing = enable_prefix_sharing(model)
    stored = pickle.dumps(model)  # transformers' own hooks, of a call, cannot be
    want = run(model, batch, **media)
    for other in (copy.deepcopy(model), pickle.loads(stored)):
        entries = Entries(other.model.vision_tower)
        for _ in range(2):
            assert_same_run(run(other, batch, **media), want, of_model=True)
        assert entries.seen[-1] == 1
    sharing.remove()
    assert not model.model.vision_tower._forward_pre_hooks
    assert repeat not in model.model.vision_tower._forward_hooks.values()
    assert not any("prefix_sharing" in name for m in model.modules() for name in m.__dict__)
    want = run(tiny_composite("llava"), batch, **media)
    assert torch.equal(run(model, batch, **media)[0], want[0])


def test_dropout_in_a_tower():
    """Draws another mask for either image: nothing is learnt, and rows differ."""
    model = tiny_composite("llava")
    batch, media = image_batch("llava")
    model.model.vision_tower.config.attention_dropout = 0.5
    for module in model.model.vision_tower.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    bypass = pytest.warns(UserWarning, match=r"input 'inputs_embeds' that differs.*dropout")
    with enable_prefix_sharing(model, verify=False) as sharing, bypass:
        entries = Entries(model.model.vision_tower)
        for _ in range(2):
            run(model, batch, **media)
    assert entries.seen == [2, 2]
    assert sharing.stats.calls == 0


# What a tower may return


@dataclass
class Output(ModelOutput):
    features: torch.Tensor | None = None
    others: tuple | None = None


class Eye(PreTrainedModel):
    """A tower of which a test says what it makes of `[images, size]`."""

    config_class = PretrainedConfig

    def __init__(self, function):
        super().__init__(PretrainedConfig())
        self.function = function
        self.seen = []

    def forward(self, pixels, sizes=None, **options):
        self.seen.append(len(pixels))
        return self.function(pixels, **options)


class Around(nn.Module):
    def __init__(self, eye):
        super().__init__()
        self.eye = eye


def called(function, *, inputs=None, calls=3, times=2, **options):
    """What a tower returned in each call, and the images that each saw; all calls in the library's
    hands, after one that is not."""
    eye = Eye(function)
    pixels = torch.arange(6.0).view(2, 3).repeat(2, 1) if inputs is None else inputs
    want = eye(pixels, **options)
    eye.seen.clear()
    towers = Towers(Around(eye), nn.Linear(1, 1))
    towers.expect(times)
    got = [eye(pixels, **options) for _ in range(calls)]
    towers.remove()
    return want, got, eye.seen


def parts_of(output):
    return [x for x in tree_flatten(output)[0] if x is not None]


FIT = {
    "a tensor": lambda x: x * 2,
    "a tuple": lambda x: (x, x[:, None].expand(-1, 5, -1)),
    "an output": lambda x: Output(features=x, others=(x + 1, None)),
    "one row of all": lambda x: x.flatten()[None],
    "an option": lambda x, factor=1: x * factor,
}


@pytest.mark.parametrize("name", FIT)
def test_outputs_that_repeat(name):
    want, got, seen = called(FIT[name], **({"factor": 3} if name == "an option" else {}))
    assert seen == [2, 4, 2, 2]  # the first is tried beside all
    for output in got:
        assert type(output) is type(want)
        for ours, theirs in zip(parts_of(output), parts_of(want), strict=True):
            assert torch.equal(ours, theirs)


UNFIT = {
    "images that see each other": lambda x: x - x.cumsum(0),
    "a list of images": lambda x: list(x),
    "something of the batch": lambda x: (x, x.sum()),
    "a number of images": lambda x: (x, len(x)),
    "chance": lambda x: x + torch.rand_like(x) * 9,
}


@pytest.mark.parametrize("name", UNFIT)
def test_outputs_that_do_not_repeat(name):
    want, got, seen = called(UNFIT[name])
    assert seen == [2, 4, 4, 4]
    if name != "chance":
        for output in got:
            for ours, theirs in zip(parts_of(output), parts_of(want), strict=True):
                assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


@pytest.mark.parametrize(
    "arguments",
    [
        {"inputs": torch.arange(12.0).view(4, 3)},
        {"times": 1},
        {"sizes": [[8, 8]] * 4},
        {"sizes": torch.arange(4)},
    ],
)
def test_inputs_that_do_not_repeat(arguments):
    _, _, seen = called(FIT["a tensor"], **arguments)
    assert seen == [4, 4, 4]


def test_other_outputs_than_the_one_that_was_learnt_from():
    eye = Eye(lambda x, more=False: (x, x * 2) if more else (x,))
    pixels = torch.arange(3.0).repeat(2, 1)
    towers = Towers(Around(eye), nn.Linear(1, 1))
    towers.expect(2)
    for more in (False, False, True, True, True):
        output = eye(pixels, more=more)
        assert [len(x) for x in output] == [2] * (1 + more)
    # Tried beside all; shared; found to differ, and run on all; tried again; shared.
    assert eye.seen == [1, 2, 1, 1, 2, 1, 2, 1]


def test_towers_that_raise():
    def function(x, fail=False):
        if fail:
            raise ValueError("no such image")
        return x

    eye = Eye(function)
    pixels = torch.arange(3.0).repeat(2, 1)
    towers = Towers(Around(eye), nn.Linear(1, 1))
    towers.expect(2)
    eye(pixels)
    with pytest.raises(ValueError, match="no such image"):
        eye(pixels, fail=True)
    towers.expect(1)
    eye.seen.clear()
    assert len(eye(pixels)) == 2
    assert eye.seen == [2]


def test_towers_that_take_no_part_of_their_input():
    """Those of the first call that raise, and those whose layers gather sharded weights."""

    def function(x):
        if len(x) < 4:
            raise ValueError("four images, please")
        return x

    want, got, seen = called(function)
    assert seen == [2, 4, 4, 4]
    assert all(torch.equal(output, want) for output in got)
    eye = Eye(lambda x: x)
    eye.weight = nn.Parameter(torch.ones(1))
    eye.weight.ds_id = 0  # as DeepSpeed marks them
    pixels = torch.arange(3.0).repeat(2, 1)
    towers = Towers(Around(eye), nn.Linear(1, 1))
    towers.expect(2)
    assert torch.equal(eye(pixels), pixels)
    assert eye.seen == [2]


def test_threads_have_calls_of_their_own():
    eye = Eye(lambda x: x)
    pixels = torch.arange(3.0).repeat(2, 1)
    towers = Towers(Around(eye), nn.Linear(1, 1))
    towers.expect(2)
    eye(pixels)
    eye.seen.clear()
    thread = Thread(target=eye, args=(pixels,))
    thread.start()
    thread.join()
    eye(pixels)
    assert eye.seen == [2, 1]
