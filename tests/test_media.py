"""Images and sound: rows that have the same share them, others share nothing."""

import random

import PIL.Image
import pytest
import torch
import transformers
from batches import LayerTokens, assert_same_run, pad_rows, run
from composites import COMPOSITES, IMAGE, image_batch, tiny_composite
from datasets import Dataset, Features, Image, List, Value
from families import CHECKPOINTING, set_checkpointing
from tiny_trl import WORDS, add_lora, assert_same_log, save_tiny_vision_model
from trl import DPOConfig, DPOTrainer

import hf_prefix_patch
from hf_prefix_patch import DataCollatorWithPrefixSharing, enable_prefix_sharing
from hf_prefix_patch.composite import decoder_of
from hf_prefix_patch.media import Shown, media_of

FAMILIES = [name for name in COMPOSITES if name not in ("gemma3", "mllama")]


def shared_run(model, batch, **kwargs):
    """Patched, with the tokens that the decoder's first layer saw."""
    seen = LayerTokens(decoder_of(model.base_model))
    with enable_prefix_sharing(model) as sharing:
        seen.shapes.clear()
        got = run(model, batch, **kwargs)
    assert (sharing.stats.calls, sharing.stats.bypassed) == (1, {})
    assert set(seen.shapes) == {(1, sharing.stats.packed_tokens)}
    return got, sharing.stats.packed_tokens


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_in_the_prompt_of_a_pair(family, mode):
    """Gradients of the tower too, which both rows of the pair reach."""
    model = tiny_composite(family)
    set_checkpointing(model, mode)
    batch, media = image_batch(family)
    want, without = run(model, batch, **media), run(model, batch)
    assert (want[0] - without[0]).abs().max() > 1e-3  # the image counts
    got, packed = shared_run(model, batch, **media)
    # Biases of keys have no gradient but for rounding.
    assert_same_run(got, want, of_model=True)
    towers = [n for n in want[1] if "vis" in n or "audio" in n]
    largest = max(gradient.abs().max() for gradient in want[1].values())
    assert max(want[1][name].abs().max() for name in towers) > 1e-3 * largest
    assert packed == 9 + 3 + 2


PICTURES = {
    # Pictures of each row, and the tokens that are left of prompts of 9 (3 without a picture).
    "two pairs, as trainers lay them out": ([(0,), (1,), (0,), (1,)], 9 + 9),
    "pairs of one image": ([(0,), (0,), (0,), (0,)], 9),
    "pairs of one image, and another": ([(0,), (0,), (1,), (0,), (0,), (1,)], 9 + 9),
    "another image in every row": ([(0,), (1,)], 9 + 9),
    "another image in one row": ([(0,), (1,), (0,), (2,)], 3 * 9),
    "chosen beside rejected": ([(0,), (0,), (1,), (1,)], 2 * 9),
    "completions of two prompts, shuffled": ([(0,), (1,), (1,), (0,), (1,), (0,)], 2 * 9),
    "two images": ([(0, 1), (0, 1)], 15),
    "the same two in another order": ([(0, 1), (1, 0)], 15 + 15),
    "more images in one of the rows": ([(0,), (1, 0, 1)], 9 + 21),
    "a row without": ([(0,), ()], 9 + 3),
    "a pair without": ([(0,), (), (0,), ()], 9 + 3),
}


@pytest.mark.parametrize("rows", PICTURES)
@pytest.mark.parametrize("family", ["qwen3-vl-moe", "llava", "smolvlm"])
def test_which_rows_share_their_images(family, rows):
    pictures, prompts = PICTURES[rows]
    model = tiny_composite(family)
    batch, media = image_batch(family, *pictures)
    want = run(model, batch, **media)
    got, packed = shared_run(model, batch, **media)
    assert_same_run(got, want, of_model=True)
    assert packed == prompts + sum(3 if row % 2 == 0 else 2 for row in range(len(pictures)))


def test_images_that_are_almost_the_same():
    model = tiny_composite("llava")
    batch, media = image_batch("llava")
    media["pixel_values"][1, 0, 0, 0] += 1e-3
    want = run(model, batch, **media)
    got, packed = shared_run(model, batch, **media)
    assert_same_run(got, want, of_model=True)
    assert packed == batch.attention_mask.sum()


def test_images_of_unlike_sizes_and_video():
    """A pair with a wide and a small image, and one with a film and a small image."""
    model = tiny_composite("qwen2.5-vl")
    generator = torch.Generator().manual_seed(3)
    wide, small, film = ([47, *[token] * n, 46] for token, n in ((IMAGE, 8), (IMAGE, 4), (48, 8)))
    prompts = [[5, *wide, *small, 6], [5, *film, *small, 6, 7]]
    rows = [[*prompts[0], 8, 9], [*prompts[1], 10], [*prompts[0], 11], [*prompts[1], 12, 13]]
    batch = pad_rows(rows, [18, 19, 18, 19], "right")
    images = torch.randn(32 + 16 + 16, 48, generator=generator).repeat(2, 1)
    films = torch.randn(32, 48, generator=generator).repeat(2, 1)
    types = (batch.input_ids == IMAGE).long() + 2 * (batch.input_ids == 48).long()
    media = {
        "pixel_values": images,
        "image_grid_thw": torch.tensor([[1, 4, 8], [1, 4, 4], [1, 4, 4]] * 2),
        "pixel_values_videos": films,
        "video_grid_thw": torch.tensor([[2, 4, 4]] * 2),
        "mm_token_type_ids": types,
    }
    want = run(model, batch, **media)
    got, packed = shared_run(model, batch, **media)
    assert_same_run(got, want, of_model=True)
    assert packed == len(prompts[0]) + len(prompts[1]) + 6


def planned(batch):
    """The rows as a worker's collator hands them on, with a plan by ids alone."""
    features = [{"row": i} for i in range(len(batch.input_ids))]
    collator = DataCollatorWithPrefixSharing.wrap(lambda _: dict(batch.inputs))
    return collator(features)


@pytest.mark.parametrize("pictures", [((0,), (0,)), ((0,), (1,))])
def test_rows_that_were_planned_without_their_images(pictures):
    model = tiny_composite("llava")
    batch, media = image_batch("llava", *pictures)
    inputs = planned(batch)
    assert inputs["input_ids"].prefix_tree.packed_tokens == 14
    want = model(**batch.inputs, **media).logits
    with enable_prefix_sharing(model) as sharing:
        got = model(**inputs, **media).logits
    real = batch.attention_mask.bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-4)
    assert sharing.stats.packed_tokens == 14 + 9 * (pictures[0] != pictures[1])


def test_reference_forward_of_the_same_batch():
    """Found by its ids, as for text."""
    model = tiny_composite("llava")
    batches = [image_batch("llava", *pictures) for pictures in (((0,), (0,)), ((0,), (1,)))]
    with torch.no_grad(), enable_prefix_sharing(model) as sharing:
        for batch, media in batches * 2:
            model(**batch.inputs, **media)
    assert sharing.stats.packed_tokens == 2 * (14 + 23)


def test_towers_that_make_of_one_image_what_they_like():
    """Dropout or a hook: what the decoder is handed is looked at, not only what went in."""
    model = tiny_composite("llava")
    batch, media = image_batch("llava")
    scale_second(model, 1.2)
    want = run(model, batch, **media)
    bypass = pytest.warns(UserWarning, match=r"bypassed: features 'inputs_embeds' that .*dropout")
    with enable_prefix_sharing(model) as sharing, bypass:
        got = run(model, batch, **media)
    assert torch.equal(got[0], want[0])
    assert sharing.stats.calls == 0


def test_features_of_deeper_layers_are_looked_at():
    """DeepStack's, where a tower runs on all images."""
    model = tiny_composite("qwen3-vl-moe")
    batch, media = image_batch("qwen3-vl-moe")
    rounds = torch.ones(8, 1)
    rounds[4:] = 1.2
    model.model.visual.deepstack_merger_list[0].register_forward_hook(
        lambda module, args, out: out * rounds[-len(out) :]
    )
    want = run(model, batch, **media)
    bypass = pytest.warns(UserWarning, match="features 'deepstack_visual_embeds' that differ")
    with enable_prefix_sharing(model) as sharing, bypass:
        got = run(model, batch, **media)
    assert torch.equal(got[0], want[0])
    assert sharing.stats.calls == 0


@pytest.mark.parametrize("computed_in", [torch.float32, torch.bfloat16])
def test_rounding_of_towers_is_none_of_that(computed_in):
    """A unit in the last place, of what autocast computes in if it is on."""
    model = tiny_composite("llava")
    batch, media = image_batch("llava")
    scale_second(model, 1 + torch.finfo(computed_in).eps)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=computed_in == torch.bfloat16)
    with torch.no_grad(), enable_prefix_sharing(model) as sharing, autocast:
        model(**batch.inputs, **media)
    assert sharing.stats.packed_tokens == 14


def scale_second(model, factor):
    """The features of the second image."""
    model.model.multi_modal_projector.register_forward_hook(
        lambda module, args, out: out * torch.tensor([1.0, factor]).view(-1, 1, 1)
    )


def test_packed_rows_have_no_images():
    model = tiny_composite("llava")
    pair = {"prompt_ids": [5, *[IMAGE] * 4, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    packed = DataCollatorWithPrefixSharing(0, layout="packed")([pair])
    packed["pixel_values"] = image_batch("llava")[1]["pixel_values"]
    enable_prefix_sharing(model)
    with pytest.raises(ValueError, match=r"packed row cannot run with: input 'pixel_values'"):
        hf_prefix_patch.completion_logps(model, packed)


BYPASSED = {
    "gemma3": "a mask that is not causal attention to real tokens",
    "mllama": "input 'cross_attention_mask' beside the text",
}


@pytest.mark.parametrize("family", BYPASSED)
def test_images_that_decoders_see_in_other_ways(family):
    """Tokens of one image that see each other, and images beside the tokens."""
    model = tiny_composite(family)
    batch, media = image_batch(family)
    want, without = run(model, batch, **media), run(model, batch)
    bypass = pytest.warns(UserWarning, match=f"bypassed: {BYPASSED[family]}")
    with enable_prefix_sharing(model) as sharing, bypass:
        got = run(model, batch, **media)
        assert (sharing.stats.calls, sharing.stats.bypassed.total()) == (0, 1)
        # The same rows without their image are text to the model: shared.
        assert_same_run(run(model, batch), without)
        assert sharing.stats.calls == 1
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(got[1][name], gradient) for name, gradient in want[1].items())


def test_images_that_never_repeat():
    """Said with what images have to do, after some batches."""
    model = tiny_composite("llava")
    batch, media = image_batch("llava", (0,), (1,))
    said = pytest.warns(UserWarning, match=r"shared no token.* images must be the same bit for")
    with enable_prefix_sharing(model), said:
        for _ in range(8):
            model(**batch.inputs, **media)


def test_what_is_taken_for_media():
    model = tiny_composite("qwen2.5-vl").model
    batch, media = image_batch("qwen2.5-vl")
    others = {"mm_encoder_outputs": {}, "pixel_values_videos": [torch.ones(2)], "unknown": media}
    others["video_grid_thw"] = torch.tensor(1)
    inputs = {**batch.inputs, **media, **others, "labels": batch.input_ids}
    assert media_of(model, model.language_model, inputs) == ["image_grid_thw", "pixel_values"]
    assert media_of(model.language_model, model.language_model, inputs) == []


def test_how_often_images_repeat():
    """Three entries are no two halves, and ids of text are no placeholders."""
    names = {"image_token_id": 9, "pad_token_id": 0, "eos_token_id": 2, "user_token_id": 7}
    config = transformers.PretrainedConfig(**names)
    ids = torch.tensor([[5, 9, 6, 7, 2], [5, 9, 6, 2, 0]])
    alike, third = torch.ones(2, 3), torch.ones(3, 3)
    assert Shown.of(config, ids, [alike]).times == 2
    for media in ([third], [alike, third], [torch.eye(2)], [alike, torch.arange(2)]):
        shown = Shown.of(config, ids, media)
        assert (shown.times, shown.numbers.tolist()) == (1, [0, 1])
    more = torch.tensor([[5, 9, 6, 7, 2], [5, 9, 9, 2, 0]])
    assert Shown.of(config, more, [alike]).numbers.tolist() == [0, 1]
    for nothing in (ids.to("meta"), ids[:0], ids[:, :0]):
        shown = Shown.of(config, nothing, [])
        assert (shown.times, len(shown.numbers)) == (1, len(nothing))
        assert shown.tell_apart(nothing).shape == nothing.shape


def test_rows_with_equal_parts_of_the_images():
    """In any order, if all have as many placeholders; else only where all of it repeats."""
    config = transformers.PretrainedConfig(image_token_id=9)
    ids = torch.tensor([[9, 9, 5], [9, 9, 6], [9, 9, 7], [9, 9, 8]])
    entries = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [torch.nan, 0.0]])
    shown = Shown.of(config, ids, [entries, torch.ones(4, 3, dtype=torch.long)])
    assert (shown.times, shown.numbers.tolist()) == (1, [0, 1, 0, 3])
    more = [entries[:, None].expand(4, 2, 2)]
    assert Shown.of(config, ids, more).numbers.tolist() == [0, 1, 0, 3]
    some = [torch.zeros(0, 3), torch.tensor([True, False, True, True]), torch.arange(4).half() // 3]
    assert Shown.of(config, ids, some).numbers.tolist() == [0, 1, 0, 3]
    ids[1] = ids[3] = 9
    assert Shown.of(config, ids, [entries]).numbers.tolist() == [0, 1, 2, 3]
    shown = Shown.of(config, ids, [entries[[0, 1, 0, 1]]])
    assert (shown.times, shown.numbers.tolist()) == (2, [0, 1, 0, 1])


def test_ids_of_rows_with_other_images():
    ids = torch.tensor([[5, 9], [5, 9], [5, 8], [6, 7]])
    assert Shown(torch.zeros(4, dtype=torch.long)).tell_apart(ids).equal(ids)
    told = Shown(torch.tensor([0, 1, 0, 1])).tell_apart(ids)
    assert told.tolist() == [[5, 9], [15, 19], [5, 8], [16, 17]]


def test_gradients_of_images():
    """Each row wants one of its own, so their prompts are not shared, only their padding."""
    model = tiny_composite("llava")
    batch, media = image_batch("llava")
    gradients = []
    for shared in (False, True):
        pixels = media["pixel_values"].clone().requires_grad_()
        if shared:
            sharing = enable_prefix_sharing(model)
        run(model, batch, pixel_values=pixels)
        gradients.append(pixels.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    assert (gradients[0].flatten(1).norm(dim=1) > 0).all()
    assert sharing.stats.packed_tokens == batch.attention_mask.sum()


def test_placeholders_that_no_config_names(monkeypatch):
    model = tiny_composite("llava")
    batch, media = image_batch("llava")
    want = run(model, batch, **media)
    monkeypatch.setattr(hf_prefix_patch.media, "_placeholders", lambda config: set())
    bypass = pytest.warns(UserWarning, match="bypassed: input 'pixel_values' beside the text")
    with enable_prefix_sharing(model) as sharing, bypass:
        assert torch.equal(run(model, batch, **media)[0], want[0])
    assert sharing.stats.calls == 0


def test_adapters_in_tower_and_decoder():
    model = add_lora(tiny_composite("llava"), "q_proj", "v_proj")
    batch, media = image_batch("llava", (0,), (1,), (0,), (1,))
    want = run(model, batch, **media)
    assert any("vision_tower" in name for name in want[1])
    with enable_prefix_sharing(model) as sharing:
        got = run(model, batch, **media)
    assert_same_run(got, want, of_model=True)
    assert sharing.stats.packed_tokens == 9 + 9 + 10


def test_completion_logps_of_rows_with_images():
    model = tiny_composite("qwen2.5-vl")
    batch, media = image_batch("qwen2.5-vl", (0,), (1,), (0,), (1,))
    rows = {**batch.inputs, "completion_mask": batch.completion, **media}
    want = run(model, batch, **media)[0]
    with torch.no_grad(), enable_prefix_sharing(model) as sharing:
        got = hf_prefix_patch.completion_logps(model, rows)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert sharing.stats.packed_tokens == 9 + 9 + 10


def pairs_with_pictures():
    generator, noise = random.Random(0), torch.Generator().manual_seed(0)

    def say(role, words):
        return [{"role": role, "content": " ".join(generator.choices(WORDS, k=words))}]

    def to_image(pixels):
        return PIL.Image.fromarray(pixels.numpy().astype("uint8"))

    rows = [
        {
            "images": [to_image(torch.randint(256, (8, 8, 3), generator=noise))],
            "prompt": say("user", generator.randint(8, 16)),
            "chosen": say("assistant", generator.randint(3, 6)),
            "rejected": say("assistant", generator.randint(3, 6)),
        }
        for _ in range(8)
    ]
    message = List({"role": Value("string"), "content": Value("string")})
    features = dict.fromkeys(("prompt", "chosen", "rejected"), message)
    return Dataset.from_list(rows, features=Features({"images": List(Image()), **features}))


def dpo_trainer(folder):
    path = save_tiny_vision_model(folder / "model")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    return DPOTrainer(
        model,
        args=DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=2,
            num_train_epochs=1,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_length=None,
        ),
        processing_class=transformers.AutoProcessor.from_pretrained(path),
        train_dataset=pairs_with_pictures(),
    )


def test_dpo_of_trl_with_images(tmp_path):
    """A vision-language model and its reference, the same log."""
    plain, shared = dpo_trainer(tmp_path), dpo_trainer(tmp_path)
    plain.train()
    with enable_prefix_sharing(shared) as sharing:
        shared.train()
    assert_same_log(shared.state.log_history, plain.state.log_history)
    assert (sharing.stats.calls, sharing.stats.bypassed) == (8, {})
    assert sharing.stats.sharing_ratio > 1.4


def test_a_token_budget_is_for_text(tmp_path):
    trainer = dpo_trainer(tmp_path)
    with pytest.raises(
        ValueError, match=r"counts the tokens of text, and .*\['images'\]; leave it out"
    ):
        enable_prefix_sharing(trainer, max_tokens_per_batch=512)
    assert "compute_loss" not in vars(trainer)
