"""What a user has who installed the wheel with none of its extras.

`make package` runs it there as `python -I tests/installed.py`, where the folder with the sources is
not on the path; pytest is not installed either.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import distributions, entry_points, version
from pathlib import Path

EXTRAS = {"accelerate", "bitsandbytes", "datasets", "gguf", "matplotlib", "peft", "tree-recurrence"}
EXTRAS |= {"pytest", "trl"}
PLACE = Path(sysconfig.get_path("purelib"))
SCRIPTS = Path(sysconfig.get_path("scripts"))

PAIRS = [
    {"prompt": "w1 w2 w3 w4 w5", "chosen": " w6 w7 w8", "rejected": " w6 w9"},
    {"prompt": "w1 w2 w3 w4 w5", "chosen": " w8", "rejected": " w9 w9 w9 w9"},
    {"prompt": "w11 w12", "chosen": " w13 w14", "rejected": " w15 w16 w17"},
]

LOADED = """\
import json, sys, torch
from transformers import LlamaForCausalLM

model = LlamaForCausalLM.from_pretrained(sys.argv[1]).train()
rows = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
print(json.dumps(model(input_ids=rows, use_cache=False).logits.tolist()))
"""


def environment():
    names = {found.metadata["Name"] for found in distributions()}
    assert not names & EXTRAS, names & EXTRAS
    spent = time.process_time()
    from transformers import PreTrainedModel  # noqa: F401  what any program with a model loads

    loaded = time.process_time()
    import hf_prefix_patch

    scope = {}
    exec("from hf_prefix_patch import *", scope)
    print(f"import: {time.process_time() - loaded:.1f} s on top of {loaded - spent:.1f} s")
    assert time.process_time() - loaded < 2
    assert scope.keys() >= set(hf_prefix_patch.__all__)
    assert Path(hf_prefix_patch.__file__).parent == PLACE / "hf_prefix_patch"
    assert version("hf_prefix_patch") == hf_prefix_patch.__version__


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(30))])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def a_training_step(folder):
    """From a JSONL file to updated weights: as without the patch, in either layout."""
    import torch
    from batches import LayerTokens, assert_same_run, gradients
    from families import tiny_model

    from hf_prefix_patch import (
        DataCollatorWithPrefixSharing,
        PrefixSharingBatchSampler,
        completion_logps,
        enable_prefix_sharing,
        tokenize_preferences,
    )

    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, PAIRS)))
    pairs = tokenize_preferences(file, tokenizer(), progress=False)
    (batch,) = PrefixSharingBatchSampler(pairs, 64)
    assert sorted(batch) == [0, 1, 2]
    plain, shared = (tiny_model("llama").train() for _ in range(2))
    tokens = LayerTokens(shared)
    sharing = enable_prefix_sharing(shared)

    def step(model, layout):
        model.zero_grad()
        collator = DataCollatorWithPrefixSharing(pad_token_id=0, layout=layout)
        logps = completion_logps(model, collator([pairs[i] for i in batch]))
        chosen, rejected = logps.chunk(2)
        torch.nn.functional.softplus(rejected - chosen).sum().backward()
        return logps.detach(), gradients(model)

    want = step(plain, "rows")
    for layout in ("rows", "packed"):
        assert_same_run(step(shared, layout), want)
    packed = sharing.stats.packed_tokens // sharing.stats.calls
    assert tokens.shapes[-2:] == [(1, packed)] * 2, tokens.shapes
    before = [p.detach().clone() for p in plain.parameters()]
    for model in (plain, shared):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    for ours, theirs, old in zip(shared.parameters(), plain.parameters(), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
        assert not torch.equal(ours, old)
    print(f"a training step: sharing ratio {sharing.stats.sharing_ratio:.2f}")


def what_is_missing_is_named():
    from families import tiny_model

    from hf_prefix_patch import enable_prefix_sharing

    def refusal(*given, **options):
        try:
            enable_prefix_sharing(*given, **options)
        except (NotImplementedError, TypeError, ValueError) as error:
            return str(error)
        raise AssertionError("not refused")

    assert "pip install tree-recurrence" in refusal(tiny_model("lfm2"))
    assert "max_tokens_per_batch" in refusal(tiny_model("llama"), max_tokens_per_batch=64)
    assert "keep_groups" in refusal(tiny_model("llama"), keep_groups=True)
    print("what is missing is named:", refusal(tiny_model("lfm2")))


def run(command, *arguments, **variables):
    done = subprocess.run(
        [str(command), *map(str, arguments)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def command_line():
    program = "hf-prefix-patch"
    command = SCRIPTS / program
    (script,) = entry_points(group="console_scripts", name=program)
    assert script.dist.name == "hf_prefix_patch"
    said = f"{program} {version('hf_prefix_patch')}\n"
    assert run(command, "--version").stdout == said
    assert run(sys.executable, "-m", "hf_prefix_patch", "--version").stdout == said
    from hf_prefix_patch.cli import COMMANDS

    listed = run(command, "--help").stdout
    for name in COMMANDS:
        assert name in listed
        assert f"{program} {name}" in run(command, name, "--help").stdout
    print("commands:", *COMMANDS)


def launcher(folder):
    """The file beside the package works in a plain Python, and so does the command."""
    import torch
    from families import tiny_model

    assert (PLACE / "hf_prefix_patch.pth").is_file()
    tiny_model("llama").save_pretrained(folder / "model")
    (folder / "script.py").write_text(LOADED)
    call = [folder / "script.py", folder / "model"]
    plain = run(sys.executable, *call, HF_PREFIX_PATCH="0")
    assert "prefix sharing" not in plain.stderr
    for shared in (
        run(sys.executable, *call, HF_PREFIX_PATCH="1"),
        run(SCRIPTS / "hf-prefix-patch", "run", *call),
    ):
        assert "5 tokens computed in place of 8" in shared.stderr, shared.stderr
        got, want = (torch.tensor(json.loads(done.stdout)) for done in (shared, plain))
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    print("launcher: 5 tokens computed in place of 8")


def main():
    # Models and batches of the tests, which need no more than the package does.
    sys.path.append(str(Path(__file__).parent))
    os.environ.pop("PYTHONPATH", None)
    environment()
    command_line()
    what_is_missing_is_named()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        a_training_step(Path(folder))
        launcher(Path(folder))


if __name__ == "__main__":
    main()
