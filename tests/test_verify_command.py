"""`hf-prefix-patch verify`: exit codes and what it says."""

import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from composites import tiny_composite
from families import sizes, tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_comparison import change_backend, detached_key
from test_verify import leaking_plan
from tiny_trl import lora_config, perturb, preference_pairs, save_tiny_model, tiny_tokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_prefix_patch import comparison, loading
from hf_prefix_patch.cli import main
from hf_prefix_patch.commands import verify
from hf_prefix_patch.commands.verify import (
    BAD_INPUT,
    DIFFERENT,
    EQUAL,
    FAILED,
    REFUSED,
    UNPROVED,
    random_pairs,
)

PAGE = (Path(__file__).parents[1] / "docs" / "verify.md").read_text()
NO_PROMPT = "ignore:.* of .* examples have no prompt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, and pairs beside it."""
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, hidden_size=64, head_dim=16, intermediate_size=128)
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


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_leaves_early(folder, pipe_without_reader, options):
    """As in `verify ... | head -1`: what was found is what the exit code says."""
    with pytest.raises(SystemExit) as stop, redirect_stdout(pipe_without_reader):
        main(["verify", str(folder), "--pairs", "2", "--no-gradients", *options])
    assert stop.value.code == EQUAL


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


@pytest.mark.parametrize("family", ["llava", "qwen3-vl-moe"])
def test_vision_language_models(verified, tmp_path, family):
    """On text: their configs need not have an id for padding."""
    tiny_composite(family, vocab_size=64, max_position_embeddings=128).save_pretrained(tmp_path)
    code, _, _ = verified(tmp_path, "--max-length", 48)
    assert code == EQUAL
    tiny_tokenizer().save_pretrained(tmp_path)
    pair = {"prompt": "w1 w2 ", "chosen": "w3", "rejected": "w4 w5", "images": ["cat.png"]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    code, _, error = verified(tmp_path, "--data", tmp_path / "pairs.jsonl")
    assert code == BAD_INPUT
    assert "line 1 has images, but only text becomes token ids here" in error


def test_refused_models(verified, tmp_path):
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    code, out, error = verified(tmp_path)
    assert (code, out) == (REFUSED, "")
    assert "T5ForConditionalGeneration is an encoder-decoder; sharing needs a decoder" in error


@pytest.mark.filterwarnings("ignore")  # of torch.compile, which transformers calls
def test_flex_attention_of_the_model(folder, verified):
    """An operator of higher order, which is measured as others are. On a CPU it has no backward,
    shared or not: no refusal of ours."""
    flex = folder, "--attn-implementation", "flex_attention", "--max-length", 48
    code, _, error = verified(*flex, "--no-gradients")
    assert code == EQUAL, error
    code, _, error = verified(*flex)
    assert code == FAILED
    assert "Traceback" in error
    assert "does not support backward on CPU" in error


def test_prompt_learning_is_refused(folder, verified, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path)
    code, _, error = verified(folder, "--adapter", tmp_path)
    assert code == REFUSED
    assert "adapter 'default' is prompt learning" in error


def test_device_of_another_accelerator(monkeypatch):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps")
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    named = {name: loading._device(name) for name in (None, "mps", "mps:0", "cpu")}
    assert named == {name: torch.device(name or "mps") for name in named}
    with pytest.raises(
        ValueError, match=r"'cuda', but this PyTorch sees only \['cpu', 'mps', 'mps:0'\]"
    ):
        loading._device("cuda")


def test_bad_input(folder, verified, tmp_path, monkeypatch):
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    small = tmp_path / "small"
    tiny_model(vocab_size=8).save_pretrained(small)
    bad, long = tmp_path / "bad.jsonl", tmp_path / "long.jsonl"
    empty, adapter = tmp_path / "empty.jsonl", tmp_path / "adapter"
    empty.write_text("")
    get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(adapter)
    weightless = tmp_path / "weightless"
    tiny_model().config.save_pretrained(weightless)
    parts, talking = tmp_path / "parts.jsonl", tmp_path / "talking"
    answers = {x: [{"role": "assistant", "content": x}] for x in ("chosen", "rejected")}
    question = {"role": "user", "content": [{"type": "text", "text": "w1"}]}
    parts.write_text(json.dumps({"prompt": [question], **answers}))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    tokenizer.save_pretrained(talking)
    bad.write_text(json.dumps({"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}) + '\n{"pro')
    long.write_text(json.dumps({"prompt": "w1 w2 w3 ", "chosen": "w4", "rejected": "w5"}))
    for words, message in (
        ((tmp_path / "nosuch",), "nosuch"),
        ((model, "--data", long), "tokenizer"),
        ((folder, "--data", "nosuch.jsonl"), "nosuch.jsonl does not exist; give"),
        ((folder, "--data", bad), "bad.jsonl, line 2 is not JSON"),
        (
            (folder, "--data", long, "--max-length", 3),
            "alone fill 3 tokens, the most of --max-length",
        ),
        ((small, "--tokenizer", folder, "--data", long), "but the model knows 8, counted from 0"),
        ((folder, "--max-length", 1), "give --max-length 2 or more"),
        ((folder, "--data", empty), "empty.jsonl holds no example, but must hold at least one"),
        (
            (adapter,),
            "holds a PEFT adapter and no config, but one is needed; give the model",
        ),
        ((folder, "--adapter", tmp_path), "could not be loaded (ValueError: Can't find 'adapter_c"),
        ((weightless,), "could not be loaded (OSError: Error no file named"),
        ((folder, "--data", parts, "--tokenizer", talking), "(raised for "),
        ((folder, "--device", "cuda:99"), "device is 'cuda:99', but this PyTorch sees only"),
        ((folder, "--device", "gpu"), "device is 'gpu', but this PyTorch sees only ['cpu'"),
        ((folder, "--device", "meta"), "device is 'meta', but this PyTorch sees only"),
        ((folder, "--data", ""), "an empty string is given, but must be a path or a name"),
        ((folder, "--tokenizer", folder), "but random tokens need none; give --data too"),
        ((folder, "--seed", -1), "'-1' is given, but must be an integer from 0 to 2**32 - 1"),
        ((folder, "--seed", 2**70), "but must be an integer from 0 to 2**32 - 1"),
        ((folder, "--backend", "flash"), "cannot serve"),
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


def test_damaged_weights(folder, verified, tmp_path):
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    tiny_model().save_pretrained(model)
    get_peft_model(tiny_model(hidden_size=32), lora_config()).save_pretrained(adapter)
    code, _, error = verified(folder, "--adapter", adapter, "--max-length", 48)
    assert code == BAD_INPUT
    assert f"the adapter from '{adapter}' could not be loaded (RuntimeError: " in error
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, error = verified(model)
    assert code == BAD_INPUT
    assert f"the model from '{model}' could not be loaded (SafetensorError: " in error
    assert "check that its files are there, whole and of one model" in error
    assert "Traceback" not in error


def test_rows_end_with_the_positions_of_the_model(folder, verified, tmp_path):
    """Whatever `--max-length` is; pairs whose prompt fills them are skipped, and that is said."""
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 512}
    config = GPT2Config(bos_token_id=1, eos_token_id=1, **sizes)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    pairs = [
        {"prompt": "w1 " * words, "chosen": "w2 w3", "rejected": "w4"} for words in (40, 3, 50, 4)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, pairs)))
    code, out, error = verified(tmp_path, "--tokenizer", folder, "--data", data)
    assert code == EQUAL
    assert "2 pairs of" in out
    assert "pairs skipped because their prompt fills 32 tokens: 2" in error
    data.write_text(json.dumps(pairs[0]))
    code, _, error = verified(tmp_path, "--tokenizer", folder, "--data", data)
    assert code == BAD_INPUT
    assert "alone fill 32 tokens, the most of --max-length and of the model's positions" in error


def test_several_eos_tokens(verified, tmp_path):
    """As Llama 3 has them, and no random token is one."""
    model = tiny_model(eos_token_id=[2, 5, 7])
    model.save_pretrained(tmp_path)
    assert verified(tmp_path, "--max-length", 48)[0] == EQUAL
    pairs = random_pairs(model.config, 50, 48)
    assert not {2, 5, 7} & {i for pair in pairs for ids in pair.values() for i in ids}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_on_the_embeddings(folder, verified, tmp_path):
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder),
        LoraConfig(target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    )
    perturb(adapted)
    adapted.save_pretrained(tmp_path)
    assert verified(folder, "--adapter", tmp_path, "--max-length", 48)[0] == EQUAL


def test_json_has_no_infinity(folder, verified, monkeypatch):
    monkeypatch.setattr(
        comparison,
        "_of_gradients",
        lambda *_: {"weight": comparison.Difference(float("inf"), float("nan"), 1.0)},
    )
    code, out, _ = verified(folder, "--max-length", 48, "--json")
    assert code == DIFFERENT
    found = json.loads(out, parse_constant=pytest.fail)
    assert found["gradients"]["weight"] == {"error": None, "noise": None, "allowed": 1.0}


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


def test_other_errors_are_not_hidden(folder, verified, monkeypatch):
    """And do not end as a mismatch does."""

    def broken(*args, **options):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(comparison, "compare_sharing", broken)
    code, out, error = verified(folder)
    assert (code, out) == (FAILED, "")
    assert "Traceback" in error
    assert "RuntimeError: CUDA error: an illegal memory access" in error


def test_exit_codes_are_those_of_help_and_page():
    for code, line in enumerate(
        ("equal", "not equal", "bad options", "the model cannot be", "nothing", "any other")
    ):
        assert re.search(rf"\b{code} {line}", " ".join(verify.__doc__.split()))
        assert re.search(rf"^\| {code} \|", PAGE, flags=re.M)
    assert [*range(6)] == [EQUAL, DIFFERENT, BAD_INPUT, REFUSED, UNPROVED, FAILED]
