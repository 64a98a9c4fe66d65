"""Composite models: batches of text; `test_media.py` has those with images and sound."""

import copy
import pickle

import pytest
import torch
import transformers
from batches import (
    LayerTokens,
    assert_same_run,
    gradients,
    left_padded_with_positions,
    pad_rows,
    preference_batch,
    run,
)
from composites import COMPOSITES, IMAGE, tiny_composite
from families import CHECKPOINTING, set_checkpointing, sizes
from tiny_trl import SPECIAL_TOKENS, WORDS, add_lora, assert_same_log, run_dpo
from transformers.masking_utils import create_masks_for_generate
from transformers.models.gemma3 import modeling_gemma3

import hf_prefix_patch
from hf_prefix_patch import DataCollatorWithPrefixSharing, enable_prefix_sharing
from hf_prefix_patch.bypass import bypass_reason
from hf_prefix_patch.composite import decoder_of


def text_batch(padding="right"):
    """No token that stands for an image."""
    return preference_batch(padding, vocab=45)


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", COMPOSITES)
def test_logps_and_gradients_of_text_equal_the_unpatched_model(family, padding, mode):
    model = tiny_composite(family)
    set_checkpointing(model, mode)
    batch = text_batch(padding)
    want = run(model, batch)
    seen = LayerTokens(decoder_of(model.base_model))
    with enable_prefix_sharing(model) as sharing:
        seen.shapes.clear()
        got = run(model, batch)
    assert_same_run(got, want)
    packed = sharing.stats.packed_tokens
    assert packed < batch.attention_mask.sum()
    assert (sharing.stats.calls, sharing.stats.bypassed) == (1, {})
    assert set(seen.shapes) == {(1, packed)}


def test_inputs_of_other_modalities_that_are_no_tensors():
    inputs = {**text_batch().inputs, "mm_encoder_outputs": {"image": None}}
    reason = bypass_reason(tiny_composite("qwen2.5-vl").model, inputs)
    assert reason == "input 'mm_encoder_outputs' beside the text"


@pytest.mark.parametrize(
    ("family", "name"), [("gemma3", "token_type_ids"), ("qwen2.5-vl", "mm_token_type_ids")]
)
def test_token_types_of_text(family, name):
    """All of them zero: text, shared."""
    model, batch = tiny_composite(family), text_batch()
    types = {name: torch.zeros_like(batch.input_ids)}
    want = run(model, batch, **types)
    with enable_prefix_sharing(model) as sharing:
        got = run(model, batch, **types)
    assert_same_run(got, want)
    assert (sharing.stats.calls, sharing.stats.bypassed) == (1, {})


def test_token_types_that_change_the_mask():
    """Gemma3's tokens of one image see each other, whether or not there is an image."""
    model, batch = tiny_composite("gemma3"), text_batch()
    types = torch.zeros_like(batch.input_ids)
    types[:, 2:5] = 1
    want = run(model, batch, token_type_ids=types)
    bypass = pytest.warns(UserWarning, match="a mask that is not causal attention to real tokens")
    with enable_prefix_sharing(model) as sharing, bypass:
        got = run(model, batch, token_type_ids=types)
    assert torch.equal(got[0], want[0])
    assert (sharing.stats.calls, sharing.stats.bypassed.total()) == (0, 1)


def test_token_types_that_differ_between_rows():
    model, batch = tiny_composite("qwen2.5-vl"), text_batch()
    types = torch.zeros_like(batch.input_ids)
    types[0, 1] = 1
    want = run(model, batch, mm_token_type_ids=types)
    bypass = pytest.warns(UserWarning, match="input 'mm_token_type_ids' that differs between")
    with enable_prefix_sharing(model), bypass:
        assert torch.equal(run(model, batch, mm_token_type_ids=types)[0], want[0])


def hand_down(model, **changes):
    """Have the composite call its decoder with something else."""
    decoder = decoder_of(model.base_model)
    return decoder.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | changes), with_kwargs=True
    )


def axes(moved=0, rows=4):
    """Three position ids a token; the last is moved in the first row."""
    positions = torch.arange(15).expand(3, rows, 15).clone()
    positions[2, 0] += moved
    return positions


DECODER_INPUTS = {
    "position_ids that differ between rows": {"position_ids": axes(moved=3)},
    "a mask that is not causal attention to real tokens": {
        "attention_mask": torch.ones(4, 1, 15, 15, dtype=torch.bool)
    },
    "input 'visual_pos_masks' that differs between rows": {
        "visual_pos_masks": torch.arange(60).view(4, 15) == 2
    },
    "input 'deepstack_visual_embeds' of the text decoder": {
        "visual_pos_masks": torch.zeros(4, 15, dtype=torch.bool),
        "deepstack_visual_embeds": [torch.zeros(1, 32)],
    },
}


@pytest.mark.parametrize("reason", DECODER_INPUTS)
def test_what_a_composite_hands_its_decoder_is_looked_at(reason):
    model, batch = tiny_composite("qwen3-vl-moe"), text_batch()
    hand_down(model, **DECODER_INPUTS[reason])
    want = run(model, batch)
    with enable_prefix_sharing(model, verify=False, on_bypass="ignore") as sharing:
        got = run(model, batch)
    assert torch.equal(got[0], want[0])
    assert (sharing.stats.calls, sharing.stats.bypassed) == (0, {reason: 1})


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_composites_take_planned_rows():
    model, batch = tiny_composite("llava"), text_batch()
    want = model(**batch.inputs).logits
    rows = DataCollatorWithPrefixSharing.wrap(lambda _: dict(batch.inputs))([{}] * 4)
    with enable_prefix_sharing(model) as sharing:
        got = torch.compile(model, backend="aot_eager")(**rows, use_cache=False).logits
    real = batch.attention_mask.bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-4)
    assert (sharing.stats.calls, sharing.stats.bypassed) == (1, {})
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", [1, 4])
def test_positions_of_several_axes_are_packed(rows):
    """What a composite computes for its decoder, one line for all rows or one for each; here
    positions twice as far apart as columns."""
    model, batch = tiny_composite("qwen3-vl-moe"), text_batch()
    hand_down(model, position_ids=axes(rows=rows) * 2)
    want = run(model, batch)
    with enable_prefix_sharing(model, verify=False) as sharing:
        got = run(model, batch)
    assert_same_run(got, want)
    assert sharing.stats.calls == 1


@pytest.mark.parametrize("number", [7, torch.tensor(7)])
def test_a_number_for_the_loss(number):
    """As transformers' trainer hands it on."""
    model, batch = tiny_composite("qwen2.5-vl"), text_batch()
    want = model(**batch.inputs, labels=batch.input_ids, num_items_in_batch=number)
    with enable_prefix_sharing(model) as sharing:
        got = model(**batch.inputs, labels=batch.input_ids, num_items_in_batch=number)
    # The loss counts padding too.
    real = batch.attention_mask.bool()
    torch.testing.assert_close(got.logits[real], want.logits[real], atol=1e-5, rtol=1e-4)
    assert (sharing.stats.calls, sharing.stats.bypassed) == (1, {})


def test_places_in_a_cache_of_which_there_is_none():
    """Composites of transformers 4 hand them on."""
    model, batch = tiny_composite("llava"), text_batch()
    want = run(model, batch)
    hand_down(model, cache_position=torch.arange(15))
    with enable_prefix_sharing(model) as sharing:
        seen = []
        model.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append("cache_position" in kwargs), with_kwargs=True
        )
        assert_same_run(run(model, batch), want)
    assert (sharing.stats.calls, seen) == (1, [False])


def test_hooks_on_the_decoder_see_rows():
    """What the composite called it with, as unpatched."""
    model, batch, seen = tiny_composite("qwen2.5-vl"), text_batch(), []

    def keep(decoder, args, kwargs, output):
        seen.append((output[0].shape, kwargs))

    model.model.language_model.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**batch.inputs, use_cache=False)
        with enable_prefix_sharing(model, verify=False) as sharing:
            model(**batch.inputs, use_cache=False)
    assert sharing.stats.calls == 1
    (want_shape, want), (shape, kwargs) = seen
    assert shape == want_shape
    assert kwargs.keys() == want.keys()
    torch.testing.assert_close(kwargs, want)


def test_positions_given_by_the_caller():
    model = tiny_composite("qwen2.5-vl")
    batch, positions = left_padded_with_positions(vocab=45)
    want = run(model, batch, position_ids=positions)
    with enable_prefix_sharing(model) as sharing:
        got = run(model, batch, position_ids=positions)
    assert_same_run(got, want)
    assert sharing.stats.packed_tokens == 33


def test_branches_do_not_see_each_other():
    model = tiny_composite("gemma3").eval()
    prompt, rejected = list(range(5, 14)), [41, 42, 43, 44]
    batches = [
        pad_rows([prompt + chosen, prompt + rejected], [9, 9], "right")
        for chosen in ([31, 32, 33, 34, 35], [29, 28, 27, 26, 25])
    ]
    with torch.no_grad(), enable_prefix_sharing(model):
        one, other = (model(**batch.inputs, use_cache=False).logits for batch in batches)
    assert torch.equal(one[1, :13], other[1, :13])
    assert (one[0, 9:] - other[0, 9:]).abs().max() > 1e-2


def test_hidden_states_and_auxiliary_loss():
    model, batch = tiny_composite("qwen3-vl-moe"), text_batch()
    asked = {"output_hidden_states": True, "output_router_logits": True}
    want = model(**batch.inputs, **asked)
    with enable_prefix_sharing(model):
        got = model(**batch.inputs, **asked)
    real = batch.attention_mask.bool()
    for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.aux_loss, want.aux_loss)


@pytest.mark.parametrize("family", [name for name in COMPOSITES if name != "qwen3.5"])
def test_packed_batches(family):
    model = tiny_composite(family)
    features = [
        {"prompt_ids": [5, 6, 7, 8, 9], "chosen_ids": [10, 11, 12], "rejected_ids": [10, 13]},
        {"prompt_ids": [5, 6, 14, 15], "chosen_ids": [16, 17], "rejected_ids": [18, 19, 20, 21]},
    ]
    results = []
    for layout in ("rows", "packed"):
        batch = DataCollatorWithPrefixSharing(0, layout=layout)(features)
        model.zero_grad()
        if layout == "packed":
            sharing = enable_prefix_sharing(model)
        logps = hf_prefix_patch.completion_logps(model, batch)
        (logps * torch.linspace(1.0, -0.7, 4)).sum().backward()
        results.append((logps.detach(), gradients(model)))
    assert_same_run(results[1], results[0])
    assert (sharing.stats.calls, sharing.stats.bypassed) == (1, {})


def test_a_packed_row_that_its_decoder_cannot_run():
    model = tiny_composite("qwen3-vl-moe")
    hand_down(model, deepstack_visual_embeds=[torch.zeros(1, 32)])
    enable_prefix_sharing(model, verify=False)
    features = [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}]
    batch = DataCollatorWithPrefixSharing(0, layout="packed")(features)
    with pytest.raises(ValueError, match=r"a packed row cannot run with: input 'deepstack"):
        hf_prefix_patch.completion_logps(model, batch)


def test_removal_copies_and_wrappers():
    """LoRA in decoder and vision tower; the copy and the stored model share by themselves."""
    model = add_lora(tiny_composite("llava"), "q_proj", "v_proj")
    batch = text_batch()
    want = run(model, batch)
    sharing = enable_prefix_sharing(model)
    assert enable_prefix_sharing(model)._patches == sharing._patches
    copied, stored = copy.deepcopy(model), pickle.dumps(model)
    assert sharing.backend == "sdpa"
    assert_same_run(run(model, batch), want, of_model=True)
    sharing.remove()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(run(model, batch)[0], want[0])
    assert_same_run(run(copied, batch), want, of_model=True)
    assert_same_run(run(pickle.loads(stored), batch), want, of_model=True)
    assert copied.base_model.model.model._prefix_sharing.stats.calls == 1


def test_calls_of_the_decoder_alone_run_as_they_are():
    model, batch = tiny_composite("llava").eval(), text_batch()
    want = model.model.language_model(**batch.inputs).last_hidden_state
    with enable_prefix_sharing(model) as sharing:
        got = model.model.language_model(**batch.inputs).last_hidden_state
    assert torch.equal(got, want)
    assert sharing.stats.calls == 0


def test_bidirectional_decoders_are_refused():
    text = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    eye = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.PaliGemmaConfig(
        text_config={**text, **heads, "model_type": "gemma"},
        vision_config={**eye, "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
        image_token_index=IMAGE,
    )
    model = transformers.PaliGemmaForConditionalGeneration(config)
    with pytest.raises(NotImplementedError, match="bidirectional attention"):
        enable_prefix_sharing(model)


def test_decoders_that_are_handed_another_mask_are_refused(monkeypatch):
    """Bidirectional attention that no config tells of."""

    def see_all(*args, **kwargs):
        return create_masks_for_generate(
            *args, **kwargs, or_mask_function=lambda b, h, q, k: q >= 0
        )

    monkeypatch.setattr(modeling_gemma3, "create_masks_for_generate", see_all)
    model = tiny_composite("gemma3")
    with pytest.raises(RuntimeError, match=r"bypassed: \{'a mask that is not causal attention"):
        enable_prefix_sharing(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_composite_without_a_decoder_of_its_own(monkeypatch):
    model = tiny_composite("llava")
    monkeypatch.setattr(type(model.model), "get_decoder", lambda self: self)
    with pytest.raises(NotImplementedError, match="without a text decoder of its own"):
        enable_prefix_sharing(model)


def test_dpo_of_trl_on_text(tmp_path):
    """A vision-language model with recurrent layers, policy and reference: the same log."""
    logs = []
    for sharing in (None, "trainer"):
        vocab = len(SPECIAL_TOKENS) + len(WORDS)
        model = tiny_composite("qwen3.5", vocab_size=vocab, max_position_embeddings=128)
        model.save_pretrained(tmp_path / "model")
        model = type(model).from_pretrained(tmp_path / "model", dtype=torch.float32)
        trained = run_dpo(model, tmp_path, sharing=sharing, learning_rate=1e-4)
        logs.append(trained.log)
    assert_same_log(logs[1], logs[0])
    assert (trained.handle.stats.calls, trained.handle.stats.bypassed) == (6, {})
    assert trained.handle.stats.sharing_ratio > 1.5
    trained.handle.remove()


@pytest.mark.parametrize("order", ["decoder first", "composite first"])
def test_a_decoder_and_its_composite_are_not_patched_both(order):
    model, batch = tiny_composite("llava"), text_batch()
    pair = [model.model.language_model, model]
    first, second = pair if order == "decoder first" else pair[::-1]
    want = run(model, batch)
    sharing = enable_prefix_sharing(first)
    with pytest.raises(RuntimeError, match=r"shared (by itself )?already.*; call disable_prefix"):
        enable_prefix_sharing(second)
    sharing.remove()
    with enable_prefix_sharing(second):
        pass
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(run(model, batch)[0], want[0])


@pytest.mark.needs(transformers=">=5.23")
def test_logits_to_keep_that_the_decoder_of_a_composite_reads():
    """Some layers of Gemma 4 run on the last tokens alone. That kills the process where a packed
    row comes in, so neither a call nor the verification may ask for it."""
    text = {
        **sizes(),
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 5,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 50,
    }
    ids = {"image_token_id": IMAGE, "video_token_id": 48, "audio_token_id": 47}
    config = transformers.Gemma4Config(
        text_config=text, vision_config=None, audio_config=None, **ids
    )
    torch.manual_seed(0)
    model, batch = transformers.Gemma4ForConditionalGeneration(config).train(), text_batch()
    want, few = run(model, batch), model(**batch.inputs, logits_to_keep=4).logits
    with enable_prefix_sharing(model, on_bypass="ignore") as sharing:
        assert torch.equal(model(**batch.inputs, logits_to_keep=4).logits, few)
        assert sharing.stats.bypassed == {"input 'logits_to_keep' of the text decoder": 1}
        assert_same_run(run(model, batch), want, of_model=True)
        assert sharing.stats.calls == 1
        pair = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}
        packed = DataCollatorWithPrefixSharing(0, layout="packed")([pair])
        with pytest.raises(ValueError, match=r"packed row cannot run with: .*; use a collator"):
            model(**packed, logits_to_keep=4)
