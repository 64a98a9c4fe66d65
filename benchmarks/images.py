"""Speed-up of sharing a pair whose prompt holds an image, over sizes of image and response.

    python benchmarks/images.py [--shape small] [--backend auto] [--images 256 ...] [--out FOLDER]

Forward and backward of a Qwen2.5-VL with random weights and without LM head: a frozen vision tower
and a decoder of the given shape. Nothing is padded, and the question after the image is short. The
ideal is the ratio of FLOPs, those of the tower included, which unshared runs on the image of either
row; the token bound is that of the decoder alone. The error is that of the shared hidden states
against the unshared, over the largest of them.
"""

import argparse
from functools import partial
from typing import Any, NamedTuple

import torch
from charts import heat_maps
from decoder import SHAPES, row_pairs, set_up, tree_pairs
from measure import GrowingTable, Side, entry, fits, medians, parse, peak_memory, setting
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLModel

from hf_prefix_patch import PrefixTree
from hf_prefix_patch.flops import DecoderShape, Work, step_flops
from hf_prefix_patch.measuring import seconds_of

MERGED, PATCH = 2, 14  # patches a side of a token, pixels a side of a patch
IMAGE, START, END = 1, 2, 3
QUESTION = 32  # tokens
TOWERS = {
    # Depth, hidden size, heads and MLP beside each decoder; the last is Qwen2.5-VL's own.
    "tiny": (1, 32, 2, 64),
    "small": (6, 192, 3, 512),
    "1.5b": (32, 1280, 16, 3420),
    "7b": (32, 1280, 16, 3420),
}
HEADER = (
    "image tokens",
    "response",
    "unshared ms",
    "shared ms",
    "speed-up",
    "ideal",
    "token bound",
    "share of ideal",
    "unshared GiB",
    "shared GiB",
    "error",
)
DEFAULTS = {
    "cpu": {
        "images": [64, 256, 576],
        "responses": [32, 128],
        "repeats": 3,
        "checkpointing": False,
    },
    "cuda": {
        "images": [256, 1024, 4096],
        "responses": [64, 256, 1024],
        "repeats": 5,
        "checkpointing": True,
    },
}


def main(argv: list[str] | None = None) -> None:
    args = parse(options(), argv, DEFAULTS)
    model = build_model(args)
    sides = [Side("unshared"), Side("shared", args.backend)]
    title = f"A pair with an image, {args.shape} decoder on {args.device}"
    title += ", weights frozen" if args.frozen else ""
    note = f"{setting(args)}, vision tower of {{}} layers, hidden size {{}}, frozen, a question of "
    note += f"{QUESTION} tokens, median of {args.repeats}"
    table = GrowingTable(title, HEADER, args.out, note.format(*TOWERS[args.shape][:2]))
    sizes = [(image, response) for image in args.images for response in args.responses]
    for size in tqdm(sizes, desc="image x response"):
        part = "an image of {} and responses of {} tokens".format(*size)
        measured = table.attempts(part, partial(measure, model, sides, size, args))
        missing = table.attempts.word(part)
        table.add([line(size, measured or {}, ideal_ratio(model, size, args), missing)])
    table.finish(lambda figure: draw(figure, table.lines))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--images", type=int, nargs="+", help="tokens of the image, squares of whole numbers")
    add("--responses", type=int, nargs="+", help="tokens")
    add("--backend", default="auto", help="of sharing")
    add("--repeats", type=int)
    return parser


def build_model(args: argparse.Namespace) -> PreTrainedModel:
    """Random weights, the same at every call, in training mode.

    Raises:
        ValueError: a shape that no tower is known for.
    """
    if args.shape not in TOWERS:
        raise ValueError(f"no vision tower for --shape {args.shape}; give one of {list(TOWERS)}")
    text, (depth, hidden, heads, mlp) = SHAPES[args.shape][1], TOWERS[args.shape]
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    section = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    tower = {"depth": depth, "hidden_size": hidden, "num_heads": heads, "intermediate_size": mlp}
    tower |= {"out_hidden_size": text["hidden_size"], "fullatt_block_indexes": [depth - 1]}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope, "max_position_embeddings": 2**18},
        vision_config={**tower, "patch_size": PATCH, "spatial_merge_size": MERGED},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        model = Qwen2_5_VLModel._from_config(config, dtype=args.dtype, attn_implementation="sdpa")
    model.visual.requires_grad_(False)
    return set_up(model, checkpointing=args.checkpointing, frozen=args.frozen)


class Pair(NamedTuple):
    """Arguments of a call on two rows that part right after the question, and `[H]` of the loss."""

    inputs: dict[str, Tensor]
    direction: Tensor


def random_pair(model: PreTrainedModel, image: int, response: int) -> Pair:
    config, generator = model.config.text_config, torch.Generator().manual_seed(0)
    side = round(image**0.5)
    if side**2 != image:
        raise ValueError(f"an image of {image} tokens is no square; give --images 64 256 576")
    text = torch.randint(4, config.vocab_size, (2, QUESTION + response), generator=generator)
    text[1, :QUESTION] = text[0, :QUESTION]
    text[1, QUESTION] = 4 + (text[0, QUESTION] - 3) % (config.vocab_size - 4)
    shown = torch.tensor([[START, *[IMAGE] * image, END]]).expand(2, -1)
    ids = torch.cat([shown, text], dim=1)
    grid = torch.tensor([[1, side * MERGED, side * MERGED]] * 2)
    pixels = 3 * model.config.vision_config.temporal_patch_size * PATCH**2
    patches = torch.randn(image * MERGED**2, pixels, generator=generator).repeat(2, 1)
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).long(), "image_grid_thw": grid}
    inputs = {name: x.to(model.device) for name, x in inputs.items()}
    inputs["pixel_values"] = patches.to(model.device, model.dtype)
    direction = torch.randn(config.hidden_size, generator=generator)
    return Pair(inputs, direction.to(model.device, model.dtype))


def step(model: PreTrainedModel, pair: Pair) -> None:
    hidden = model(**pair.inputs, use_cache=False).last_hidden_state
    (hidden @ pair.direction).float().sum().backward()


def measure(
    model: PreTrainedModel, sides: list[Side], size: tuple[int, int], args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds and peaks of both sides, and the error of the shared one.

    Raises:
        RuntimeError: nothing was shared.
    """
    pair = random_pair(model, *size)
    states, peaks = [], {}
    for side in sides:
        with side.on(model) as sharing:
            step(model, pair)  # warm-up, and the call from which sharing learns of the tower
            with torch.no_grad():
                states.append(model(**pair.inputs, use_cache=False).last_hidden_state)
            if sharing is not None and sharing.stats.sharing_ratio <= 1:
                raise RuntimeError(f"nothing was shared: {dict(sharing.stats.bypassed)}")
            peaks[side.name] = fits(lambda: peak_memory(model, lambda: step(model, pair)))
    error = (states[1] - states[0]).abs().max() / states[0].abs().max()

    def timed(side: Side) -> float:
        with side.on(model):
            step(model, pair)
            model.zero_grad(set_to_none=True)
            return seconds_of(lambda: step(model, pair), model.device)

    seconds = medians({side.name: partial(timed, side) for side in sides}, args.repeats)
    return {"seconds": seconds, "peaks": peaks, "error": error.item()}


def line(
    size: tuple[int, int], measured: dict[str, Any], ideals: tuple[float, float], missing: str
) -> tuple:
    """A line of the table, or in place of its figures why there are none."""
    seconds, peaks = (measured.get(name, {}) for name in ("seconds", "peaks"))
    gain = seconds["unshared"] / seconds["shared"] if seconds else None
    ideal, bound = ideals
    return (
        *size,
        *(entry(seconds.get(name), 1e3, missing) for name in ("unshared", "shared")),
        entry(gain, missing=missing),
        ideal,
        bound,
        entry(gain, 1 / ideal, missing),
        *(entry(peaks.get(name), 2**-30, missing) for name in ("unshared", "shared")),
        entry(measured.get("error"), missing=missing),
    )


def ideal_ratio(
    model: PreTrainedModel, size: tuple[int, int], args: argparse.Namespace
) -> tuple[float, float]:
    """FLOPs of the step unshared over those of it shared, and the same of decoder tokens."""
    inputs = random_pair(model, *size).inputs
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    ids, tower = inputs["input_ids"], counter.get_total_flops()
    tree, lengths = PrefixTree.from_rows(ids), [ids.shape[1]] * len(ids)
    work = Work(sum(lengths), {None: row_pairs(lengths)})
    shared = Work(tree.packed_tokens, {None: tree_pairs(tree)})
    shape = DecoderShape.of(model.config)
    options = {"checkpointing": args.checkpointing, "frozen": args.frozen}
    before, after = (step_flops(shape, x, **options).total for x in (work, shared))
    return (before + tower) / (after + tower / 2), work.tokens / shared.tokens


def draw(figure: Any, table: list[tuple]) -> None:
    cells = {(image, response): (gain, ideal) for image, response, _, _, gain, ideal, *_ in table}
    heat_maps(figure, {"one image": cells}, "response tokens", "image tokens")


if __name__ == "__main__":
    main()
