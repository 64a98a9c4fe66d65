"""`hf-prefix-patch verify`: exit codes and what it says."""

import json
import re
from pathlib import Path

import pytest
import torch
from families import sizes, tiny_model
from peft import get_peft_model
from test_comparison import change_backend, detached_key
from test_verify import leaking_plan
from tiny_trl import lora_config, perturb, preference_pairs, save_tiny_model, tiny_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_prefix_patch import comparison, loading
from hf_prefix_patch.cli import main
from hf_prefix_patch.commands import verify
from hf_prefix_patch.commands.verify import BAD_INPUT, DIFFERENT, EQUAL, REFUSED, UNPROVED

PAGE = (Path(__file__).parents[1] / "docs" / "verify.md").read_text()
NO_PROMPT = "ignore:.* of .* examples have no prompt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, and pairs beside it."""
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, hidden_size=64, head_dim=16, intermediate_size=128)
    tiny_tokenizer().save_pretrained(path)
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, preference_pairs())))
    return path


@pytest.fixture
def verified(capsys):
    """Exit code, standard output and standard error of a command line."""

    def run(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["verify", *map(str, words)])
        return stop.value.code, *capsys.readouterr()

    return run


def test_random_pairs(folder, verified):
    code, out, _ = verified(folder, "--max-length", 48)
    assert code == EQUAL
    head, _, table = out.partition("\n\n")
    assert head == (
        f"{folder}: LlamaForCausalLM, float32 on cpu, backend sdpa\n"
        f"4 pairs of random tokens, rows of up to {re.search('up to ([0-9]+)', head)[1]} tokens"
    )
    for label in ("log-probs of chosen, max", "log-probs of rejected, mean", "gradients, median"):
        assert re.search(rf"^{label}.*( +[\d.]+e-0[5678]){{3}}$", table, flags=re.M), table
    tokens = re.search(r"tokens: (\d+) in rows, (\d+) with padding, (\d+) packed: ([\d.]+)x", out)
    rows, padded, packed = (int(tokens[i]) for i in (1, 2, 3))
    assert packed < rows < padded
    assert float(tokens[4]) == pytest.approx(padded / packed, abs=0.01)
    assert re.search(r"time: +[\d.]+ s unshared, [\d.]+ s shared: [\d.]+x", out)
    assert re.search(r"memory: [\d.]+ MiB in tensors unshared, [\d.]+ MiB shared: [\d.]+x", out)
    assert out.endswith(
        "\n\nequal: log-probs and gradients differ by no more than the model's own noise\n"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pairs_of_a_file_as_json(folder, verified, dtype):
    words = ("--data", folder / "pairs.jsonl", "--pairs", 3, "--dtype", dtype, "--repeats", 1)
    code, out, _ = verified(folder, *words, "--json", "--gradient-checkpointing")
    found = json.loads(out)
    assert (code, found["verdict"], found["mismatches"]) == (EQUAL, "equal", [])
    assert (found["pairs"], found["dtype"], found["device"]) == (3, dtype, "cpu")
    assert len(found["gradients"]) == 21
    assert len(found["shared_seconds"]) == 1
    assert found["packed_tokens"] < found["row_tokens"]


def test_without_gradients(folder, verified):
    code, out, _ = verified(folder, "--no-gradients", "--max-length", 48)
    assert code == EQUAL
    assert "own noise; gradients were not compared" in out
    assert "gradients, worst" not in out


def test_wrong_gradients(folder, verified, monkeypatch):
    """The check at enable time cannot see them."""
    change_backend(monkeypatch, attend=detached_key)
    code, out, _ = verified(folder, "--max-length", 48)
    assert code == DIFFERENT
    assert "NOT EQUAL: shared results differ by more than the model's own noise:\n" in out
    assert re.search(r"gradient of .*k_proj.weight: 1.0e\+00, where noise explains \d", out)
    assert "\nequal" not in out
    code, out, _ = verified(folder, "--max-length", 48, "--json")
    assert (code, json.loads(out)["verdict"]) == (DIFFERENT, "mismatch")


def test_wrong_results(folder, verified, monkeypatch):
    change_backend(monkeypatch, plan=leaking_plan)
    code, _, error = verified(folder)
    assert code == DIFFERENT
    assert "hidden states of LlamaModel differ from the unshared ones" in error


def test_noise_that_hides_everything(folder, verified, monkeypatch):
    monkeypatch.setattr(comparison.Comparison, "verdict", "too noisy")
    code, out, _ = verified(folder, "--max-length", 48)
    assert code == UNPROVED
    assert "NOTHING PROVED: the model's own noise" in out


@pytest.mark.filterwarnings(NO_PROMPT)
def test_nothing_shared(folder, verified, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "", "chosen": "w1 w2", "rejected": "w3"}))
    code, out, error = verified(folder, "--data", data)
    assert (code, out) == (UNPROVED, "")
    assert "no two rows of these pairs share a token, so comparing would prove nothing" in error


def test_adapters(folder, verified, tmp_path):
    model = get_peft_model(tiny_model(vocab_size=64, hidden_size=64, head_dim=16), lora_config())
    perturb(model)
    model.save_pretrained(tmp_path)
    common = (folder, "--max-length", 48, "--json", "--repeats", 1)
    tensors = json.loads(verified(*common, "--adapter", tmp_path)[1])["gradients"]
    assert len(tensors) == 16
    code, out, _ = verified(*common, "--lora")
    tensors = json.loads(out)["gradients"]
    assert (code, len(tensors)) == (EQUAL, 28)
    assert any("lora_A" in name and x["noise"] > 0 for name, x in tensors.items())
    code, _, error = verified(folder, "--adapter", tmp_path, "--lora")
    assert code == BAD_INPUT
    assert "only one is trained; leave out one" in error


@pytest.mark.filterwarnings("ignore::FutureWarning:bitsandbytes")
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_four_bits(folder, verified, dtype):
    pytest.importorskip("bitsandbytes", reason="quantised base models need bitsandbytes")
    words = (folder, "--load-in-4bit", "--dtype", dtype, "--max-length", 48, "--json")
    code, out, _ = verified(*words)
    found = json.loads(out)
    assert (code, len(found["gradients"])) == (EQUAL, 28)
    assert found["dtype"] == ("bfloat16" if dtype == "auto" else dtype)


@pytest.mark.filterwarnings("ignore:Some weights")
def test_reward_models(verified, tmp_path):
    config = LlamaConfig(**sizes(), num_labels=1, attn_implementation="sdpa")
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    code, out, _ = verified(tmp_path, "--max-length", 48)
    assert code == EQUAL
    assert "scores of rejected, max" in out
    assert "equal: scores and gradients" in out


def test_refused_models(verified, tmp_path):
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    code, out, error = verified(tmp_path)
    assert (code, out) == (REFUSED, "")
    assert "T5ForConditionalGeneration is an encoder-decoder; sharing needs a decoder" in error


def test_bad_input(folder, verified, tmp_path, monkeypatch):
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    small = tmp_path / "small"
    tiny_model(vocab_size=8).save_pretrained(small)
    bad, long = tmp_path / "bad.jsonl", tmp_path / "long.jsonl"
    bad.write_text(json.dumps({"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}) + '\n{"pro')
    long.write_text(json.dumps({"prompt": "w1 w2 w3 ", "chosen": "w4", "rejected": "w5"}))
    places = f"there are {torch.cuda.device_count()}" if torch.cuda.is_available() else "sees no"
    for words, message in (
        ((tmp_path / "nosuch",), "nosuch"),
        ((model, "--data", long), "tokenizer"),
        ((folder, "--data", "nosuch.jsonl"), "nosuch.jsonl does not exist; give"),
        ((folder, "--data", bad), "bad.jsonl, line 2 is not JSON"),
        ((folder, "--data", long, "--max-length", 3), "alone fill --max-length 3, which leaves"),
        ((small, "--tokenizer", folder, "--data", long), "but the model knows 8, counted from 0"),
        ((folder, "--max-length", 1), "give --max-length 2 or more"),
        ((folder, "--device", "cuda:99"), places),
        ((folder, "--device", "gpu"), "device is 'gpu', but must be cpu, cuda or cuda:N"),
        ((folder, "--dtype", "int8"), "invalid choice: 'int8'"),
        ((folder, "--pairs", 0), "must be an integer of at least 1"),
    ):
        code, out, error = verified(*words)
        assert (code, out) == (BAD_INPUT, ""), words
        assert message in error
        assert "Traceback" not in error
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    for option in ("--load-in-4bit", "--lora"):
        code, _, error = verified(folder, option)
        assert code == BAD_INPUT
        assert re.search(
            r"need the package (bitsandbytes|peft), which is not .*`pip install", error
        )


def test_too_little_memory(folder, verified, monkeypatch):
    for problem in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ):

        def full(*args, problem=problem, **options):
            raise problem

        monkeypatch.setattr(comparison, "compare_sharing", full)
        code, _, error = verified(folder)
        assert code == BAD_INPUT
        assert "out of memory; lower --pairs or --max-length" in error


def test_other_errors_are_not_hidden(folder, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(comparison, "compare_sharing", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        main(["verify", str(folder)])


def test_exit_codes_are_those_of_help_and_page():
    for code, line in enumerate(
        ("equal", "not equal", "bad options", "the model cannot be", "nothing")
    ):
        assert re.search(rf"\b{code} {line}", " ".join(verify.__doc__.split()))
        assert re.search(rf"^\| {code} \|", PAGE, flags=re.M)
    assert [*range(5)] == [EQUAL, DIFFERENT, BAD_INPUT, REFUSED, UNPROVED]
