"""`hf-prefix-patch estimate`: its numbers against counts by hand, its output, what it refuses."""

import json
import re
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny_model
from tiny_trl import preference_pairs, save_tiny_model, tiny_tokenizer
from transformers import LlamaConfig, OPTConfig

from hf_prefix_patch import PrefixSharingBatchSampler, cli, tokenize_preferences
from hf_prefix_patch import estimate_report as report
from hf_prefix_patch.estimate import DataSet, Setting, estimate, random_epochs, read_data_set
from hf_prefix_patch.flops import DecoderShape, Work, step_flops
from hf_prefix_patch.workload import Pairs

WAYS = ["padded", "packed", "shared_in_pairs", "shared_across", "sampler_pairs", "sampler_tokens"]
ANSWERS = ("chosen_ids", "rejected_ids")


@pytest.fixture
def folder(tmp_path):
    """A tiny model with its tokenizer."""
    return Path(save_tiny_model(tmp_path / "model"))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(map(json.dumps, preference_pairs(13))))
    return path


@pytest.fixture
def run(path, folder, capsys):
    """The command; returns what it printed, parsed with `--json`."""

    def run(*options, data=path, tokenizer=folder):
        cli.main(["estimate", str(data), "--tokenizer", str(tokenizer), *map(str, options)])
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in options else out

    return run


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_leaves_early(path, folder, pipe_without_reader, options):
    with redirect_stdout(pipe_without_reader):
        cli.main(["estimate", str(path), "--tokenizer", str(folder), *options])


def data_set(examples, max_length=None, **sizes):
    """As `read_data_set`, from ids."""
    lengths = [[len(x[name]) for name in ("prompt_ids", *ANSWERS)] for x in examples]
    return DataSet(Pairs.of(examples, max_length), np.array(lengths), sizes.get("rows_cut", 0))


def rows_of(example, limit=None):
    return [(example["prompt_ids"] + example[name])[:limit] for name in ANSWERS]


def distinct(rows):
    return len({tuple(row[: i + 1]) for row in rows for i in range(len(row))})


# The numbers


@pytest.mark.parametrize("limit", [None, 40])
def test_tokens_of_an_epoch(path, limit):
    """All ways, by sets of prefixes; the batches of the last two are the sampler's own."""
    tokenizer = tiny_tokenizer()
    examples = tokenize_preferences(path, tokenizer, max_length=limit, progress=False)
    setting = Setting(4, 150, max_length=limit, epochs=2, seed=3)
    found = estimate(read_data_set(path, tokenizer, limit, progress=False), setting)
    assert list(found.epochs) == WAYS
    rows = [rows_of(x, limit) for x in examples]
    at_random = random_epochs(len(examples), setting)
    assert sorted(chain.from_iterable(at_random)) == sorted([*range(len(examples))] * 2)
    assert at_random[0] != at_random[len(at_random) // 2]
    samplers = [
        PrefixSharingBatchSampler(examples, max_length=limit, seed=3, **limits)
        for limits in ({"max_pairs": 4}, {"max_tokens": 150})
    ]
    sampled = [[batch for _ in range(2) for batch in sampler] for sampler in samplers]
    batches = dict(zip(WAYS, [at_random] * 4 + sampled, strict=True))
    for way, epoch in found.epochs.items():
        together = [[row for i in batch for row in rows[i]] for batch in batches[way]]
        count = {
            "padded": lambda b: len(b) * max(map(len, b)),
            "packed": lambda b: sum(map(len, b)),
            "shared_in_pairs": lambda b: sum(distinct(b[i : i + 2]) for i in range(0, len(b), 2)),
        }.get(way, distinct)
        assert epoch.tokens == sum(map(count, together)) / 2, way
        assert epoch.batches == len(batches[way]) / 2
        assert epoch.most_tokens == max(map(count, together))
        assert epoch.most_cells == max(len(b) * max(map(len, b)) for b in together)
        assert epoch.cost == epoch.tokens
        assert found.speed_up(way) == found.epochs["padded"].tokens / epoch.tokens


def test_flops_of_an_epoch():
    """One batch, shared across: every number by hand."""
    examples = [
        {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]},
        {"prompt_ids": [5, 6], "chosen_ids": [7, 1], "rejected_ids": [7, 1, 2]},
    ]
    shape = DecoderShape("tiny", 100, {None: 10, 3: 1}, 1000)
    found = estimate(data_set(examples), Setting(2, epochs=2), shape)
    depths = [1, 2, 3, 3, 4, 4, 5]
    unique = Work(7, {None: sum(depths), 3: 1 + 2 + 5 * 3}, 1 + 2 + 2 + 3)
    options = {"checkpointing": True, "frozen": True, "reference": True, "head_again": True}
    assert found.epochs["shared_across"].flops == step_flops(shape, unique, **options)
    cells = Work(4 * 5, {None: 4 * 25, 3: 4 * 25}, 8)
    assert found.epochs["padded"].flops == step_flops(shape, cells, **options)
    ratio = sum(step_flops(shape, cells, **options)) / sum(step_flops(shape, unique, **options))
    assert found.speed_up("shared_across") == ratio
    other = Setting(2, checkpointing=False, frozen=False, reference=False, head_again=False)
    assert estimate(data_set(examples), other, shape).epochs["shared_across"].flops == step_flops(
        shape, unique
    )


def test_suggested_budget_is_the_largest_padded_batch(path):
    data = read_data_set(path, tiny_tokenizer(), progress=False)
    examples = tokenize_preferences(path, tiny_tokenizer(), progress=False)
    longest = max(len(row) for x in examples for row in rows_of(x))
    for size, rows in [(4, 8), (100, 26)]:
        found = estimate(data, Setting(size))
        assert found.suggested_max_tokens == found.max_tokens == rows * longest
    given = estimate(data, Setting(4, max_tokens=200))
    assert (given.max_tokens, given.suggested_max_tokens) == (200, 8 * longest)
    assert given.epochs["sampler_tokens"].batches > found.epochs["sampler_tokens"].batches


def test_lengths_and_what_is_left_out(path, folder, run):
    """Percentiles are of all pairs uncut; a prompt that fills `max_length` leaves its pair out."""
    examples = tokenize_preferences(path, tiny_tokenizer(), progress=False)
    prompts = sorted(len(x["prompt_ids"]) for x in examples)
    limit = prompts[6]  # the whole of one prompt
    found = run("--json", "--max-length", limit)
    left = [x for x in examples if len(x["prompt_ids"]) < limit]
    assert 0 < len(left) < 13
    assert (found["pairs"], found["pairs_left_out"]) == (13, 13 - len(left))
    assert found["rows_cut"] == sum(len(row) > limit for x in left for row in rows_of(x)) > 0
    assert found["lengths"]["prompt"] == {
        "p5": prompts[1],
        "p50": prompts[6],
        "p95": prompts[11],
        "max": prompts[12],
        "mean": pytest.approx(np.mean(prompts)),
    }
    assert found["lengths"]["row"]["max"] == max(len(row) for x in examples for row in rows_of(x))
    kept = [row for x in left for row in rows_of(x, limit)]
    share = sum(2 * len(x["prompt_ids"]) for x in left) / sum(map(len, kept))
    assert found["prompt_share"] == pytest.approx(share)
    keeps_end = run("--json", "--max-length", limit, "--truncation-mode", "keep_end")
    assert keeps_end["pairs_left_out"] == 0
    assert run("--json", "--max-length", "none")["rows_cut"] == 0


def test_limit_draws_pairs(path, run):
    first, again, other = (run("--json", "--limit", 5, "--seed", s) for s in (0, 0, 1))
    assert first["pairs"] == 5
    assert first == again
    assert first["lengths"] != other["lengths"]
    assert run("--json", "--limit", 50)["pairs"] == 13


# The command


def test_json(run, folder):
    found = run("--json", "--batch-size", 4)
    assert list(found) == [
        "pairs",
        "pairs_left_out",
        "rows_cut",
        "lengths",
        "prompt_share",
        "setting",
        "model",
        "epochs",
        "gain",
        "max_tokens_per_batch",
        "suggested_max_tokens_per_batch",
        "refusal",
        "worth_it",
        "advice",
    ]
    page = (Path(__file__).parents[1] / "docs" / "estimate.md").read_text()
    for keys in (found, found["epochs"], found["epochs"]["padded"], found["model"], found["gain"]):
        assert all(f"`{key}`" in page for key in keys), keys
    assert list(found["epochs"]) == WAYS
    shape = DecoderShape.of(LlamaConfig.from_pretrained(folder))
    heads = [{"window": None, "size": shape.heads[None]}]
    assert found["model"] == vars(shape) | {"heads": heads}
    padded, best = found["epochs"]["padded"], found["epochs"][found["gain"]["best"]]
    assert (padded["speed_up"], padded["token_ratio"], padded["batches"]) == (1, 1, 4)
    assert padded["pairs_per_batch"] == 13 / 4
    flops = [sum(epoch["flops"].values()) for epoch in (padded, best)]
    assert best["speed_up"] == found["gain"]["both"] == flops[0] / flops[1]
    gain = found["gain"]
    assert gain["both"] == pytest.approx(gain["padding_removed"] * gain["sharing"])
    assert found["worth_it"] is (gain["sharing"] >= 1.05) is True
    assert found["gain"]["best"] in ("shared_across", "sampler_pairs")
    assert found["setting"]["max_length"] == 1024


def test_options_reach_the_setting(run):
    options = ["--max-tokens", 300, "--no-reference", "--no-checkpointing", "--full", "--seed", 7]
    options += ["--head", "cells", "--attention", "flash", "--batch-size", 2]
    found = run("--json", *options)["setting"]
    switched = dict.fromkeys(("checkpointing", "frozen", "reference"), False)
    want = Setting(2, 300, attention="flash", head="cells", seed=7, **switched)
    assert found == vars(want)


def test_text(run, path):
    """A table within 100 columns, and sentences."""
    text = run("--batch-size", 4)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "13 pairs, rows of at most 1,024 tokens (0 cut)"
    found = run("--batch-size", 4, "--json")
    names = ["padded", "packed, n", "packed and shared in", "packed and shared a"]
    names.append("the same, sampler of 4 pairs")
    for way, name in zip(WAYS[:5], names, strict=True):
        (line,) = [x for x in lines if x.startswith(name)]
        epoch = found["epochs"][way]
        assert line.split()[-3:-1] == [f"{epoch['tokens']:,.0f}", f"{1 / epoch['token_ratio']:.1%}"]
        assert line.endswith(f" {epoch['speed_up']:.2f}")
    joined = " ".join(lines)
    for sentence in found["advice"]:
        assert sentence in joined
    assert "LoRA, checkpointing on, a reference forward, LM head on completion tokens" in joined


def test_without_a_config(run, folder):
    (folder / "config.json").unlink()
    text = run()
    assert "No model config was given or found beside the tokenizer" in " ".join(text.splitlines())
    found = run("--json")
    assert found["model"] is None
    for epoch in found["epochs"].values():
        assert epoch["flops"] is None
        assert epoch["speed_up"] == epoch["token_ratio"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_config_elsewhere(run, folder, tmp_path, kind):
    other = tiny_model("qwen3-moe").config
    other.save_pretrained(tmp_path / "other")
    given = tmp_path / "other" / ("config.json" if kind == "file" else "")
    assert run("--json", "--model-config", given)["model"]["name"] == "qwen3_moe"
    assert run("--json", "--model-config", "none")["model"] is None


def test_plot(run, tmp_path):
    run("--plot", tmp_path / "gain.png")
    assert (tmp_path / "gain.png").stat().st_size > 10_000
    run("--plot", tmp_path / "gain.svg", "--model-config", "none")
    svg = (tmp_path / "gain.svg").read_text()
    assert svg.startswith("<?xml")


def test_progress_goes_to_stderr(path, folder, capsys):
    cli.main(["estimate", str(path), "--tokenizer", str(folder), "--json"])
    captured = capsys.readouterr()
    json.loads(captured.out)
    assert "13/13" in captured.err


# What to do


def long_answers():
    """Prompts of 1, answers of 40 that differ at once."""
    return [
        {"prompt_ids": [3], "chosen_ids": [10 + i] * 40, "rejected_ids": [60 + i] * 40}
        for i in range(8)
    ]


SHAPE = DecoderShape("tiny", 10_000, {None: 64}, 1000)


def advice(examples, shape=SHAPE, max_length=None, **options):
    rows_cut = options.pop("rows_cut", 0)
    setting = Setting(2, max_length=max_length, **options)
    data = data_set(examples, max_length, rows_cut=rows_cut)
    if setting.truncation_mode == "keep_end":
        data = DataSet(Pairs.of(examples, max_length, "keep_end"), data.lengths, rows_cut)
    return estimate(data, setting, shape)


def test_long_completions_are_not_worth_it():
    found = advice(long_answers())
    text = " ".join(report.advice(found))
    assert report.as_dict(found)["worth_it"] is False
    assert "Sharing is not worth it for these pairs: it saves 1.8% of the tokens" in text
    assert "completions are long beside their prompts (2% of the tokens of rows)" in text
    assert text.count("Leave the model unpatched.") == 1


def test_padding_alone_is_said_to_be_what_is_gained():
    examples = long_answers()
    for example in examples[::2]:
        example["rejected_ids"] = [9]
    found = advice(examples)
    text = " ".join(report.advice(found))
    assert found.speed_up("packed") > 1.2
    assert "What is gained is padding removed, which any packing does." in text


def test_a_head_that_outweighs_the_decoder():
    examples = [
        {"prompt_ids": [3 + i] * 40, "chosen_ids": [50] * 20, "rejected_ids": [60] * 20}
        for i in range(8)
    ]
    assert report.as_dict(advice(examples))["worth_it"] is True
    text = " ".join(report.advice(advice(examples, DecoderShape("tiny", 10, {None: 1}, 10**6))))
    assert "it saves 33% of the tokens, but the LM head, which it leaves as it is, is 100%" in text


def test_truncation_from_the_front():
    examples = [
        {
            "prompt_ids": [*range(99 * i, 99 * i + 40)],
            "chosen_ids": [50] * 5,
            "rejected_ids": [60] * (6 + i),
        }
        for i in range(8)
    ]
    cut = {"max_length": 30, "rows_cut": 16}
    assert report.as_dict(advice(examples, **cut))["worth_it"] is True
    text = " ".join(report.advice(advice(examples, truncation_mode="keep_end", **cut)))
    assert "keep_end cuts the two rows of a pair by different amounts" in text


def test_pairs_of_one_prompt_are_brought_together():
    examples = [
        {"prompt_ids": [3 + i % 4] * 40, "chosen_ids": [50 + i], "rejected_ids": [70 + i]}
        for i in range(16)
    ]
    found = advice(examples)
    assert found.speed_up("sampler_pairs", over="shared_across") > 1.3
    assert any(x.startswith("Pairs have text in common") for x in report.advice(found))
    assert not any(x.startswith("Pairs have") for x in report.advice(advice(long_answers())))


def test_the_budget_is_explained():
    examples = [
        {"prompt_ids": [3 + i] * 40, "chosen_ids": [50], "rejected_ids": [60]} for i in range(8)
    ]
    suggested = report.advice(advice(examples))[-2]
    assert "max_tokens_per_batch=164: as many tokens as the largest padded batch" in suggested
    assert "(4 rows of 41). It gives 1." in suggested
    assert "x, 2.7 pairs a batch, 3 batches in place of 4. With 1.3 times the pairs" in suggested
    assert not any("max_tokens" in x for x in report.advice(advice(long_answers())))
    given = report.advice(advice(long_answers(), max_tokens=100))[-1]
    assert given.startswith("max_tokens_per_batch=100 gives 1.0")
    assert "x, 1.0 pairs a batch, 8 batches in place of 4. Suggested" in given
    assert "Suggested for the memory of batches of 2 pairs: 164" in given


def test_rows_that_a_budget_lets_in_are_cautioned_against():
    prompt = {"prompt_ids": [3] * 40}
    examples = [{**prompt, "chosen_ids": [50 + i], "rejected_ids": [70 + i]} for i in range(16)]
    last = report.advice(advice(examples))[-1]
    assert last.startswith("As rows, such a batch has up to 1,312 cells (8.0 times as many)")
    assert "max_pairs" in last
    assert "max_pairs" not in " ".join(report.advice(advice(examples[:2])))


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", 0], "argument --batch-size: '0' is given, but must be"),
        (["--max-tokens", -1], "argument --max-tokens: '-1' is given, but must be"),
        (["--max-length", 0], "argument --max-length: '0' is given, but must be"),
        (["--limit", 0], "argument --limit: '0' is given, but must be"),
        (["--max-length", "long"], "argument --max-length: 'long' is given"),
        (["--max-tokens", 50], "max_tokens is 50, but .* more unique tokens alone, up to .* give"),
        (["--max-length", 5], r"prompts of all 13 pairs of .* fill max_length=5 .* raise max_l"),
        (["--model-config", "nosuch"], "no config could be loaded from 'nosuch'; give a folder"),
        (["--max-length", "long"], "of at least 1; leave it out for the default, or give none"),
        (["--plot", "nosuch/x.png"], "--plot is nosuch/x.png, but nosuch is no folder; make it"),
        (["--seed", -1], "'-1' is given, but must be an integer from 0 to 2"),
        (["--model-config", ""], "an empty string is given"),
        (["--head", "all"], "argument --head: invalid choice: 'all'"),
    ],
)
def test_options_that_cannot_be(refused, options, message):
    assert re.search(message, refused(*options))


@pytest.fixture
def refused(run, capsys):
    """What the command says when it ends with 2, in one line."""

    def refused(*options, **given):
        with pytest.raises(SystemExit) as ended:
            run(*options, **given)
        assert ended.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        error = " ".join(captured.err.split("error: ")[-1].split())
        assert "Traceback" not in error
        return error

    return refused


def test_what_is_wrong_with_the_data_stands_alone(run, path, capsys):
    """As of `verify`: the summary of options explains nothing of it."""
    path.write_text("")
    with pytest.raises(SystemExit):
        run()
    error = capsys.readouterr().err
    assert "error: " in error
    assert "usage" not in error


def test_data_that_is_broken(refused, path, tmp_path):
    """Named by file and place, by the same code as in `tokenize_preferences`."""
    text = path.read_text()
    path.write_text(text[:-20])
    assert re.search(r"talk\.jsonl, line 13 is not JSON .* written in part", refused())
    path.write_text(text + '\n{"prompt": "w1", "chosen": "w2"}')
    assert re.search(r"talk\.jsonl, line 14 has values in the columns", refused())
    path.write_text("")
    assert re.search(r"talk\.jsonl holds no example", refused())
    assert re.search(r"nosuch\.jsonl does not exist", refused(data=tmp_path / "nosuch.jsonl"))
    assert re.search(r"pairs\.csv does not exist", refused(data=tmp_path / "pairs.csv"))


def test_tokenizers_that_are_none(refused, folder, tmp_path):
    message = "nosuch' is not there, but must be a folder with tokenizer.json; give another"
    assert message in refused(tokenizer=tmp_path / "nosuch")
    assert "no tokenizer could be loaded from" in refused(tokenizer=tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    error = refused(tokenizer=folder)
    assert "tokenizer.chat_template is not set" in error
    assert re.search(r"raised for .*talk\.jsonl, line 1\)", error)


def test_templates_that_do_not_take_a_talk(refused, path, folder):
    message = [{"role": "user", "content": "w1"}]
    answers = {x: [{"role": "assistant", "content": x}] for x in ("chosen", "rejected")}
    path.write_text(json.dumps({"prompt": message, **answers}))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no talk') }}"
    tokenizer.save_pretrained(folder)
    error = refused(tokenizer=folder)
    assert re.search(r"the chat template does not take .*talk\.jsonl, line 1 \(no talk\)", error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "foo9"}, "no config could be loaded from .*; it stands beside the token"),
        ({"num_attention_heads": "four"}, "no config could be loaded from .*by --model-config"),
        (
            {"pad_token_id": 60000},
            r"no 'llama' model can be built from the config \(AssertionError",
        ),
    ],
)
def test_configs_that_are_of_no_use(refused, folder, changes, message):
    """Never left out in silence."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert re.search(message, refused())


def test_reward_models_have_no_lm_head(run, tmp_path):
    config = tiny_model().config
    config.architectures = ["LlamaForSequenceClassification"]
    config.save_pretrained(tmp_path)
    assert "no LM head, attention" in " ".join(run("--model-config", tmp_path).split())
    found = run("--json", "--model-config", tmp_path, "--no-reference")
    assert all(epoch["flops"]["head"] == 0 for epoch in found["epochs"].values())


def test_models_that_are_not_shared_gain_nothing(run, tmp_path):
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    OPTConfig(vocab_size=99, word_embed_proj_dim=16, **sizes).save_pretrained(tmp_path)
    found = run("--json", "--model-config", tmp_path)
    assert "OPTForCausalLM has a head that calls" in found["refusal"]
    assert not found["worth_it"]
    assert found["advice"] == [f"Nothing of this is gained with this model: {found['refusal']}."]


def test_what_is_left_of_few_pairs_is_said(path, folder):
    pairs = [{"prompt": "w1 " * n, "chosen": "w2", "rejected": "w3"} for n in (2, 20, 20, 20, 3)]
    path.write_text("\n".join(map(json.dumps, pairs)))
    data = read_data_set(path, tiny_tokenizer(), 8, progress=False)
    said = " ".join(report.advice(estimate(data, Setting(max_length=8))))
    assert "about the 2 of 5 pairs that are left; raise max_length" in said


def test_warnings_are_plain(run, path):
    """Without the place in our code that they come from, which helps nobody at a command line."""
    path.write_text(json.dumps({"prompt": "", "chosen": "w2", "rejected": "w3"}))
    before, said = warnings.formatwarning, []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *about, **_: said.append(warnings.formatwarning(*about))
        run()
    assert any(x.startswith("warning: 1 of 1 examples have no prompt") for x in said)
    assert warnings.formatwarning is before


def test_a_chart_takes_matplotlib(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib`, or leave the chart out" in refused("--plot", "x.png")


def test_help_comes_without_torch():
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from hf_prefix_patch.cli import main; main(['estimate', '--help'])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--max-tokens M" in run.stdout


def test_masks_that_padded_rows_are_given():
    """What `work_of` takes for granted of sdpa: a mask where there is padding, or where a window is
    shorter than the row, and a causal kernel without one elsewhere."""
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(*args, **kwargs):
        masks.append((kwargs.get("attn_mask") is None, kwargs.get("is_causal")))
        return attend(*args, **kwargs)

    full = torch.ones(2, 8, dtype=torch.long)
    ragged = full.clone()
    ragged[1, 6:] = 0
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
        for family, mask, unmasked in [
            ("llama", full, [True, True]),
            ("llama", ragged, [False, False]),
            ("qwen2-window", full, [False, True]),  # a window of 5 in the first layer
        ]:
            masks.clear()
            tiny_model(family)(input_ids=full * 5, attention_mask=mask, use_cache=False)
            assert masks == [(none, none) for none in unmasked], family
