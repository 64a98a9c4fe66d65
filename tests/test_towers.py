"""Towers run once on images that a batch holds several times."""

import copy
import gc
import pickle
import weakref
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from threading import Barrier, Thread
from time import sleep

import pytest
import torch
from batches import assert_same_run, run
from composites import image_batch, tiny_composite
from families import CHECKPOINTING, set_checkpointing
from peft import LoraConfig, get_peft_model
from tiny_trl import add_lora
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._pytree import tree_flatten
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_prefix_patch import disable_prefix_sharing, enable_prefix_sharing
from hf_prefix_patch.towers import expect, repeat_output, take_first, unhook_towers

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
    """Images that a tower ran on, a number a run."""

    def __init__(self, tower, entries=1):
        self.seen = []
        self._entries, self._forward = entries, tower.forward
        tower.forward = self._run

    def _run(self, *args, **kwargs):
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        self.seen.append(len(first) // self._entries)
        return self._forward(*args, **kwargs)


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_runs_on_one_of_two_images(family, mode):
    """With its gradients, and both kinds of checkpointing; Gemma3's too, whose decoder does not
    share images."""
    model = tiny_composite(family)
    set_checkpointing(model, mode)
    batch, media = image_batch(family)
    want = run(model, batch, **media)
    with enable_prefix_sharing(model, on_bypass="ignore"):
        entries = Entries(tower_of(model, family), FAMILIES[family][1])
        for _ in range(3):
            assert_same_run(run(model, batch, **media), want, of_model=True)
    assert entries.seen == [1, 2, 1, 1, 1]  # a trial on the first and on all


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
        hooked = [m for m in model.modules() if take_first in m._forward_pre_hooks.values()]
        assert hooked == [model.model.visual]  # and no part of it, nor the decoder
    # One image proves less of a tower than several, and has a trial of its own.
    assert entries.seen == [3, 6, 3, 3, 1, 4, 1, 4]


def test_adapters():
    model = add_lora(tiny_composite("llava"), "q_proj", "v_proj")
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
        run(model, batch, **media)
        entries = Entries(model.model.vision_tower)
        assert torch.equal(model(**batch.inputs, **media, use_cache=True).logits, want)
        model.get_image_features(**media)
        assert (entries.seen, sharing.stats.calls) == ([2, 2], 1)


def test_copies_and_removal():
    model = tiny_composite("llava")
    batch, media = image_batch("llava")
    sharing = enable_prefix_sharing(model)
    stored = pickle.dumps(model)  # transformers' own hooks, of a call, cannot be
    want = run(model, batch, **media)
    for other in (copy.deepcopy(model), pickle.loads(stored)):
        entries = Entries(other.model.vision_tower)
        assert_same_run(run(other, batch, **media), want, of_model=True)
        assert entries.seen[-1] == 1
        disable_prefix_sharing(other)
        assert_comes_off(other)
    sharing.remove()
    assert_comes_off(model)
    want = run(tiny_composite("llava"), batch, **media)
    assert torch.equal(run(model, batch, **media)[0], want[0])


def assert_comes_off(model):
    tower = model.model.vision_tower
    assert take_first not in tower._forward_pre_hooks.values()
    assert repeat_output not in tower._forward_hooks.values()
    assert not any("prefix_sharing" in name for m in model.modules() for name in m.__dict__)


def test_a_handle_keeps_no_tower_alive():
    model = tiny_composite("llava")
    sharing, tower = enable_prefix_sharing(model), weakref.ref(model.model.vision_tower)
    batch, media = image_batch("llava")
    run(model, batch, **media)
    del model
    gc.collect()
    assert tower() is None
    assert sharing.stats.calls == 1


@pytest.mark.parametrize("order", [0, 1])
def test_a_tower_of_two_models(order):
    """A reference model that has the policy's: either may let go of it first."""
    models = [tiny_composite("llava"), tiny_composite("llava")]
    models[1].model.vision_tower = models[0].model.vision_tower
    batch, media = image_batch("llava")
    want = run(models[0], batch, **media)
    handles = [enable_prefix_sharing(model) for model in models]
    entries = Entries(models[0].model.vision_tower)
    for model in models:
        assert_same_run(run(model, batch, **media), want, of_model=True)
    assert entries.seen == [1, 2, 1, 1]  # with a trial on the first and on all
    handles[order].remove()
    assert_same_run(run(models[1 - order], batch, **media), want, of_model=True)
    assert entries.seen[4:] == [1, 2, 1]
    handles[1 - order].remove()
    for model in models:
        assert_comes_off(model)


def test_towers_that_are_exchanged_or_wrapped():
    """After enabling: by another, or by PEFT, which makes a copy."""
    model, other = tiny_composite("llava"), tiny_composite("llava")
    batch, media = image_batch("llava")
    want = run(model, batch, **media)
    sharing = enable_prefix_sharing(model)
    assert_same_run(run(model, batch, **media), want, of_model=True)
    model.model.vision_tower = other.model.vision_tower
    entries = Entries(model.model.vision_tower)
    assert_same_run(run(model, batch, **media), want, of_model=True)
    assert entries.seen == [1, 2, 1]  # with a trial on the first and on all
    in_decoder = r".*language_model.*q_proj"
    config = LoraConfig(target_modules=in_decoder, modules_to_save=["vision_tower"])
    wrapped = get_peft_model(model, config)
    trained = model.model.vision_tower.modules_to_save["default"]
    entries = Entries(trained)
    run(wrapped, batch, **media)
    assert entries.seen[-1] == 1
    sharing.remove()
    assert not any("prefix_sharing" in name for m in wrapped.modules() for name in m.__dict__)
    assert take_first not in trained._forward_pre_hooks.values()


def test_dropout_in_a_tower():
    """One mask for both images, as for a prompt in the decoder."""
    model = tiny_composite("llava")
    batch, media = image_batch("llava")
    for module in model.model.vision_tower.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    with enable_prefix_sharing(model, verify=False) as sharing:
        entries = Entries(model.model.vision_tower)
        for _ in range(2):
            run(model, batch, **media)
        once, again = (run(model, batch, **media)[0] for _ in range(2))
    assert entries.seen == [1, 2, 1, 1, 1, 1]
    assert sharing.stats.calls == 4
    assert not torch.equal(once, again)


def test_a_trial_draws_no_random_numbers():
    """The call itself draws those of the first images."""
    eye = Eye(lambda x: nn.functional.dropout(x, 0.5, eye.training))
    pixels, drawn = torch.ones(2, 3), []
    with hooked(eye):
        for call in (lambda: eye.forward(pixels[:1]), lambda: eye(pixels)):
            torch.manual_seed(1)
            call()
            drawn.append(torch.rand(1))
    assert eye.seen == [1, 1, 2, 1]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("around", ["model", "tower"])
def test_checkpoints_around_a_tower(around):
    """It runs again in backward, on what it ran on before."""
    model = called = tiny_composite("llava")
    batch, media = image_batch("llava")
    want = run(model, batch, **media)
    enable_prefix_sharing(model)
    if around == "model":
        called = checkpoint_wrapper(model)
    else:
        model.model.vision_tower = checkpoint_wrapper(model.model.vision_tower)
    for _ in range(2):
        logps, found = run(called, batch, **media)
        found = {name.replace("_checkpoint_wrapped_module.", ""): x for name, x in found.items()}
        assert_same_run((logps, found), want, of_model=True)


def test_means_that_a_tower_learns():
    """A part of the images has other means than all of them."""
    model = tiny_composite("llava")
    norm = nn.BatchNorm1d(16)
    model.model.vision_tower.encoder.layers[0].mlp.fc2.register_forward_hook(
        lambda module, args, out: norm(out.flatten(0, 1)).view_as(out)
    )
    model.model.vision_tower.norm = norm
    batch, media = image_batch("llava")
    twin = copy.deepcopy(norm.state_dict())
    want = run(model, batch, **media)
    means = norm.running_var.clone()
    norm.load_state_dict(twin)
    with enable_prefix_sharing(model):
        norm.load_state_dict(twin)
        entries = Entries(model.model.vision_tower)
        assert_same_run(run(model, batch, **media), want, of_model=True)
        assert torch.equal(norm.running_var, means)
        norm.eval()
        run(model, batch, **media)
        norm.train()
        run(model, batch, **media)
    assert entries.seen == [2, 1, 2, 1, 2]


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
    """What a tower returned in each call, and the images that each of its runs was for; all calls
    in the library's hands, after one that is not."""
    eye = Eye(function)
    pixels = torch.arange(6.0).view(2, 3).repeat(2, 1) if inputs is None else inputs
    want = eye(pixels, **options)
    eye.seen.clear()
    with hooked(eye, times):
        got = [eye(pixels, **options) for _ in range(calls)]
    assert not eye._forward_pre_hooks
    assert not eye._forward_hooks
    return want, got, eye.seen


@contextmanager
def hooked(eye, times=2):
    around, decoder = Around(eye), nn.Linear(1, 1)
    expect(around, decoder, times)
    yield partial(expect, around, decoder)
    unhook_towers(around)


def assert_equal(ours, theirs):
    leaves, spec = tree_flatten(ours)
    others, wanted = tree_flatten(theirs)
    assert spec == wanted
    for x, y in zip(leaves, others, strict=True):
        if y is None:
            assert x is None
        else:
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(y))


FIT = {
    "a tensor": lambda x: x * 2,
    "a tuple": lambda x: (x, x[:, None].expand(-1, 5, -1)),
    "an output": lambda x: Output(features=x, others=(x + 1, None)),
    "one row of all": lambda x: x.flatten()[None],
    "a mask": lambda x: (x, x > 2),
    "rounding": lambda x: x * (1 + torch.arange(len(x))[:, None] * 1e-6),
}


@pytest.mark.parametrize("name", FIT)
def test_outputs_that_repeat(name):
    want, got, seen = called(FIT[name])
    assert seen == [2, 4, 2, 2, 2]  # with a trial
    for output in got:
        assert type(output) is type(want)
        if name != "rounding":
            assert_equal(output, want)


UNFIT = {
    "images that see each other": lambda x: x - x.cumsum(0),
    "an embedding of places": lambda x: x + 0.02 * torch.arange(len(x))[:, None],
    "a list of images": lambda x: list(x),
    "something of the batch": lambda x: (x, x.sum()),
    "a number of images": lambda x: (x, len(x)),
    "a mask of places": lambda x: (x, torch.arange(len(x)) > 1),
}


@pytest.mark.parametrize("name", UNFIT)
def test_outputs_that_do_not_repeat(name):
    want, got, seen = called(UNFIT[name])
    assert seen == [2, 4, 4, 4, 4]
    for output in got:
        assert_equal(output, want)


@pytest.mark.parametrize(
    "arguments",
    [
        {"inputs": torch.arange(12.0).view(4, 3)},
        {"inputs": torch.zeros(0, 3)},
        {"times": 1},
        {"sizes": [[8, 8]] * 4},
        {"sizes": torch.arange(4)},
    ],
)
def test_inputs_that_do_not_repeat(arguments):
    _, _, seen = called(FIT["a tensor"], **arguments)
    assert seen == [len(arguments.get("inputs", range(4)))] * 3


def test_each_kind_of_call_has_its_trial():
    """Options, ranks and modes, of which outputs may depend."""
    eye = Eye(lambda x, more=False: (x, x * 2) if more else (x,))
    pixels = torch.arange(3.0).repeat(2, 1)
    with hooked(eye):
        for more in (False, True, False, True):
            assert_equal(eye(pixels, more=more), eye.function(pixels, more=more))
        assert eye.seen == [1, 2, 1] * 2 + [1, 1]
        eye.seen.clear()
        eye.eval()
        eye(pixels)
        eye(pixels[:, None])
        assert eye.seen == [1, 2, 1] * 2


def test_outputs_of_another_form_than_in_the_trial():
    """Of which no argument tells: more of them, or something in the place of nothing."""
    pixels = torch.arange(3.0).repeat(2, 1)
    for first, then in (((1,), (1, 2)), ((1, None), (1, 2)), ((1, 2), (1, None))):
        factors = [first]

        def function(x, factors=factors):
            return tuple(None if factor is None else x * factor for factor in factors[-1])

        eye = Eye(function)
        with hooked(eye):
            eye(pixels)
            factors.append(then)
            eye.seen.clear()
            assert_equal(eye(pixels), function(pixels))
            assert eye.seen == [1, 2]


def test_towers_that_take_no_part_of_their_input():
    """Those that raise, and those whose layers gather sharded weights."""

    def function(x):
        if len(x) < 4:
            raise ValueError("four images, please")
        return x

    want, got, seen = called(function)
    assert seen == [2, 4, 4, 4]
    for output in got:
        assert_equal(output, want)
    eye = Eye(lambda x: x)
    eye.weight = nn.Parameter(torch.ones(1))
    eye.weight.ds_id = 0  # as DeepSpeed marks them
    with hooked(eye):
        eye(torch.arange(3.0).repeat(2, 1))
    assert eye.seen == [2]


def test_a_trial_that_runs_out_of_memory():
    """Says nothing of the tower."""

    def function(x):
        if len(x) < 4:
            raise torch.OutOfMemoryError("no more")
        return x

    with pytest.raises(torch.OutOfMemoryError):
        called(function, calls=1)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_calls_that_are_broken_off(error):
    """The next one is for images of its own."""

    def function(x):
        if state["fails"]:
            raise error
        return x

    state, eye, pixels = {"fails": False}, Eye(function), torch.arange(3.0).repeat(2, 1)
    with hooked(eye) as expected:
        eye(pixels)
        state["fails"] = True
        with pytest.raises(error):
            eye(pixels)
        state["fails"] = False
        other = torch.arange(6.0).view(2, 3)
        assert_equal(eye(other), other)
        with suppress(error):
            state["fails"] = True
            eye(pixels)
        state["fails"] = False
        expected(1)
        assert_equal(eye(pixels), pixels)


def test_threads():
    """First calls at once: one trial, after which the tower is in the mode that it was in."""
    starts = Barrier(2)

    def function(x):
        sleep(0.01)
        return x * 2

    def call():
        starts.wait(10)
        got.append(eye(pixels))

    eye, pixels, got = Eye(function), torch.arange(6.0).view(2, 3).repeat(2, 1), []
    with hooked(eye):
        threads = [Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert eye.training
    assert eye.seen == [2, 4, 2, 2]
    for output in got:
        assert_equal(output, pixels * 2)


def test_options_that_are_another_in_every_call():
    """Of what the tower reads, some kinds have a trial; what it does not read makes no kind."""
    eye, pixels = Eye(lambda x, **options: x * 2), torch.arange(6.0).view(2, 3).repeat(2, 1)
    with hooked(eye):
        for number in range(20):
            assert_equal(eye(pixels, num_items_in_batch=number), pixels * 2)
        assert eye.seen == [2, 4] + [2] * 20
        eye.seen.clear()
        for number in range(20):
            assert_equal(eye(pixels, sizes=number), pixels * 2)
    assert eye.seen == [2, 4, 2] * 15 + [4] * 5


def test_tensors_that_cannot_be_looked_at():
    eye, pixels = Eye(lambda x: x * 2), torch.arange(3.0).repeat(2, 1)
    with hooked(eye):
        stacked = torch.func.vmap(eye)(pixels.expand(5, 2, 3))
        assert torch.equal(stacked[0], pixels * 2)
        assert eye(pixels.to("meta")).is_meta
    assert eye.seen == [2, 2]


def test_hooks_of_the_user_see_all_images():
    eye, seen = Eye(lambda x: x), []
    eye.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    pixels = torch.arange(3.0).repeat(2, 1)
    with hooked(eye):
        eye.register_forward_hook(lambda module, args, output: seen.append(len(output)))
        eye(pixels)
    assert seen == [2, 2]
