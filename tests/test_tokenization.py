"""`tokenize_preferences`: the ids of TRL's `DPOTrainer` from any source, and bad input named."""

import json
import logging
import sys

import pytest
from datasets import (
    Dataset,
    DatasetDict,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_from_disk,
)
from hypothesis import given
from hypothesis import strategies as st
from tiny_trl import dpo_config, load, preference_pairs, save_tiny_model, tiny_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer
from trl.data_utils import extract_prompt

from hf_prefix_patch.tokenization import tokenize_preferences

# TRL and transformers announce renamed and deprecated options; what they are is no concern here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.* examples have no prompt"),
]

IDS = ["prompt_ids", "chosen_ids", "rejected_ids"]
TEMPLATE = (
    "{% for t in tools or [] %}<system> {{ t['function']['name'] }} {% endfor %}"
    "{% if style %}{{ style }} {% endif %}"
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {{ thought }}{% endif %}"
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("w20", "w21")
]


def say(role, text):
    return {"role": role, "content": text}


def text(prompt="w1 w2 ", chosen="w3", rejected="w4 w5"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def talk(prompt="w1 w2", chosen="w3", **more):
    answers = {"chosen": [say("assistant", chosen)], "rejected": [say("assistant", "w4 w5")]}
    return {"prompt": [say("user", prompt)], **answers, **more}


def whole(example):
    """The same conversation or text, the prompt written in front of both answers."""
    prompt = example["prompt"]
    return {name: prompt + example[name] for name in ("chosen", "rejected")}


def tokenizer_with(template=TEMPLATE, bos=False):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<system> $A", special_tokens=[("<system>", 3)]
        )
    return tokenizer


CONVERSATIONS = preference_pairs(8).to_list()
TURNS = [say("user", "w1"), say("assistant", "w2")]
EXAMPLES = {
    "strings": [text(), text("w1 ", "w3 <eos>", ""), text("", "w1", "w2")],
    "strings-that-merge": [text("w1 w", "2", " w3 w4"), text("w1 w", "2 w5", "2 w6"), text()],
    "strings-without-prompt": [
        whole(text()),
        whole(text("w1 w", "2", "3")),
        {"chosen": "w1 w2", "rejected": "w1 w2 w3"},
        {"chosen": "w1 w2", "rejected": "w1 w2"},
        {"chosen": "w1", "rejected": "w2"},
    ],
    "messages": CONVERSATIONS,
    "messages-without-prompt": [
        *map(whole, CONVERSATIONS),
        *({"chosen": TURNS * n, "rejected": TURNS * 2} for n in (1, 2, 3)),
    ],
    "tools": [talk(tools=TOOLS), talk("w7", tools=TOOLS[:1]), talk("w8", tools=None)],
    "tools-as-json": [talk(tools=json.dumps(TOOLS)), talk("w7", tools=None)],
    "template-options": [
        talk(chat_template_kwargs={"style": "w30"}),
        talk("w7", chat_template_kwargs={"style": "w31"}),
        talk("w8", chat_template_kwargs={"style": None}),
    ],
    "prompts-that-end-differently": [
        talk(chat_template_kwargs={"thought": "w9"}),
        talk("w7", "w9 w3", chat_template_kwargs={"thought": "w9"}),
    ],
}


@pytest.fixture(scope="module")
def trl_pairs(tmp_path_factory):
    """What TRL's trainer makes of examples."""
    path = tmp_path_factory.mktemp("model")
    model = load(save_tiny_model(path))

    def prepare(examples, tokenizer, **options):
        return DPOTrainer(
            model=model,
            args=dpo_config(path, **options),
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
        ).train_dataset

    return prepare


@pytest.fixture
def jsonl(tmp_path):
    """A JSONL file of examples or of lines."""

    def write(lines, name="pairs.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
        return path

    return write


def ids(data, tokenizer, **options):
    return tokenize_preferences(data, tokenizer, progress=False, **options)


# The same ids as TRL

ids_of_today = pytest.mark.needs(trl=">=0.29")  # before, texts are tokenised in other pieces


@ids_of_today
@pytest.mark.filterwarnings("ignore:in . of . examples the prompt alone")
@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_ids_of_trl(trl_pairs, jsonl, kind, bos):
    tokenizer = tokenizer_with(bos=bos)
    want = trl_pairs(EXAMPLES[kind], tokenizer).select_columns(IDS)
    dataset = Dataset.from_list(EXAMPLES[kind])
    got = ids(dataset, tokenizer)
    assert got.select_columns(IDS).features == want.features
    assert set(got.column_names) == {*dataset.column_names, *IDS}
    assert got.select_columns(IDS).to_list() == want.to_list()
    assert ids(EXAMPLES[kind], tokenizer) == want.to_list()
    assert ids(iter(EXAMPLES[kind]), tokenizer) == want.to_list()
    assert ids(jsonl(EXAMPLES[kind]), tokenizer) == want.to_list()


@ids_of_today
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_prompts_that_fill_max_length(trl_pairs, mode, caplog):
    tokenizer = tiny_tokenizer()
    options = {"max_length": 37, "truncation_mode": mode}
    want = trl_pairs(CONVERSATIONS, tokenizer, **options).select_columns(IDS).to_list()
    lengths = sorted(len(x["prompt_ids"]) for x in ids(CONVERSATIONS, tokenizer))
    assert lengths[0] < 37 < lengths[-1]
    assert 37 in lengths, "the limit itself is tried"
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_prefix_patch"):
        assert ids(CONVERSATIONS, tokenizer, **options) == want
        dataset = ids(Dataset.from_list(CONVERSATIONS), tokenizer, **options)
    assert dataset.select_columns(IDS).to_list() == want
    left_out = sum(length >= 37 for length in lengths)
    said = f"{left_out} of 8 examples left out, as their prompt alone fills max_length=37 tokens"
    ours = [x.getMessage() for x in caplog.records if x.name.startswith("hf_prefix_patch")]
    assert ours == ([said] * 2 if mode == "keep_start" else [])
    assert max(len(x["prompt_ids"] + x["chosen_ids"]) for x in want) > 37, "rows are not cut here"


def characters():
    """One token a character."""
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, " ": 3}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("<eos>|."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


TEXTS = st.text("ab ", min_size=1, max_size=6)


@given(TEXTS, TEXTS, TEXTS)
def test_texts_are_split_as_by_trl(start, chosen, rejected):
    example = {"chosen": start + chosen, "rejected": start + rejected}
    assert ids([example], characters()) == ids([extract_prompt(example)], characters())


def test_texts_without_a_common_start_have_no_prompt():
    """TRL 1.16 looks for a space before the first character at the end of chosen, and finds it."""
    examples = [{"chosen": "ab ", "rejected": "ba"}, {"chosen": "", "rejected": "ba"}]
    pairs = ids(examples, characters())
    assert [x["prompt_ids"] for x in pairs] == [[], []]
    assert [x["chosen_ids"] for x in pairs] == [[1, 2, 3, 0], [0]]
    assert [x["rejected_ids"] for x in pairs] == [[2, 1, 0]] * 2


def test_many_examples_of_several_kinds_keep_their_order():
    examples = [x for n in range(20) for x in (text(f"w{n} "), talk(f"w{n}"), whole(talk(f"w{n}")))]
    tokenizer = tokenizer_with()
    assert ids(examples, tokenizer) == [ids([x], tokenizer)[0] for x in examples]


# Sources


def test_folders_saved_by_datasets(tmp_path):
    dataset, tokenizer = Dataset.from_list(CONVERSATIONS), tiny_tokenizer()
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(tmp_path / "several")
    want = ids(CONVERSATIONS, tokenizer)
    assert ids(tmp_path / "one", tokenizer) == want
    assert ids(str(tmp_path / "several"), tokenizer) == want


def test_processes():
    dataset, tokenizer = Dataset.from_list(CONVERSATIONS), tiny_tokenizer()
    got = ids(dataset, tokenizer, num_proc=2, max_length=32)
    assert got.to_list() == ids(dataset, tokenizer, max_length=32).to_list()


def test_other_columns(jsonl):
    examples = [text() | {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5, "votes": 3}] * 2
    tokenizer = tiny_tokenizer()
    dataset = ids(Dataset.from_list(examples), tokenizer)
    names = [*IDS, "ref_chosen_logps", "ref_rejected_logps"]
    assert dataset.column_names == [*examples[0], *IDS]
    assert dataset.select_columns(list(text())).to_list() == [text()] * 2
    assert [list(x) for x in ids(examples, tokenizer)] == [names] * 2
    assert ids(jsonl(examples), tokenizer) == dataset.select_columns(names).to_list()


def test_a_long_run_of_empty_prompts():
    """`datasets` could not tell from the first of them what a prompt holds."""
    dataset = Dataset.from_list([text("")] * 1100 + [text()])
    assert ids(dataset, tiny_tokenizer())[-1]["prompt_ids"] == [7, 8]


def test_lines(tmp_path):
    """A byte order mark, blank lines, other ends of lines, and what `splitlines` would split at."""
    path = tmp_path / "pairs.jsonl"
    line = json.dumps(text("w1 \u2028w2 "), ensure_ascii=False)
    path.write_bytes(f"\ufeff{line}\r\n\n  \n{line}".encode())
    assert ids(path, tiny_tokenizer()) == ids([text()] * 2, tiny_tokenizer())


def test_without_datasets(monkeypatch, jsonl, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert ids(jsonl([text()]), tiny_tokenizer()) == ids([text()], tiny_tokenizer())
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        ids(tmp_path, tiny_tokenizer())


# What is said


@pytest.mark.parametrize("source", [list, Dataset.from_list])
def test_warning_of_cut_prompts(source):
    data = source(EXAMPLES["prompts-that-end-differently"] + [talk()])
    said = r"in 2 of 3 examples .* that end \('w9' in the first\) is left out"
    with pytest.warns(UserWarning, match=said) as caught:
        ids(data, tokenizer_with())
    assert [x.filename for x in caught] == [__file__]


def test_warning_of_cut_prompts_that_were_tokenised_before(tmp_path):
    Dataset.from_list([text("w1 w", "2", "2 w3")]).save_to_disk(tmp_path)
    dataset, tokenizer = load_from_disk(tmp_path), tiny_tokenizer()
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"end \('<unk>' in the first\)"):
            got = ids(dataset, tokenizer, num_proc=1)
    assert got["prompt_ids"][:] == [[7]]


@pytest.mark.parametrize("source", [list, Dataset.from_list])
def test_progress(source, capsys):
    data, tokenizer = source([text()] * 40), tiny_tokenizer()
    ids(data, tokenizer)
    assert capsys.readouterr().err == ""
    assert not are_progress_bars_disabled()
    tokenize_preferences(data, tokenizer)
    shown = capsys.readouterr().err
    assert "Tokenising preferences: 100%" in shown
    assert "40/40" in shown


def test_bars_that_were_hidden_stay_hidden():
    disable_progress_bars()
    try:
        ids(Dataset.from_list([text()]), tiny_tokenizer())
        assert are_progress_bars_disabled()
    finally:
        enable_progress_bars()


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length is 0, but must be at least 1"),
        ({"truncation_mode": "keep_middle"}, "truncation_mode is 'keep_middle', but must be"),
        ({"num_proc": 2}, r"num_proc is 2, but only a datasets\.Dataset"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        ids([text()], tiny_tokenizer(), **options)


def test_paths(tmp_path, jsonl):
    tokenizer = tiny_tokenizer()
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist; give a JSONL"):
        ids(tmp_path / "none.jsonl", tokenizer)
    with pytest.raises(ValueError, match=r"pairs\.csv is not JSONL, JSON or Parquet by its na"):
        ids(jsonl([text()], "pairs.csv"), tokenizer)
    with pytest.raises(FileNotFoundError, match="neither a"):
        ids(tmp_path, tokenizer)
    DatasetDict(test=Dataset.from_list([text()])).save_to_disk(tmp_path / "test-only")
    with pytest.raises(ValueError, match=r"has the splits \['test'\], but .*test-only.test"):
        ids(tmp_path / "test-only", tokenizer)


@pytest.mark.parametrize("last", ["{'prompt': 1}", json.dumps(text())[:-9], '{"prompt": "w1'])
def test_lines_that_are_not_json(jsonl, last):
    path = jsonl([text(), "", last])
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 3 is not JSON .*repair or remove"):
        ids(path, tiny_tokenizer())


def test_lines_that_are_not_utf8(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(text("é "), ensure_ascii=False).encode("latin-1"))
    with pytest.raises(ValueError, match=r"line 1 is not JSON in UTF-8.*can't decode byte 0xe9"):
        ids(path, tiny_tokenizer())


def test_no_examples(jsonl):
    for data in ([], iter([]), Dataset.from_list([text()]).select([])):
        with pytest.raises(ValueError, match="data holds no example"):
            ids(data, tiny_tokenizer())
    with pytest.raises(ValueError, match=r"pairs\.jsonl holds no example"):
        ids(jsonl(["", ""]), tiny_tokenizer())


def test_a_dict_is_no_list_of_examples():
    with pytest.raises(TypeError, match=r"data is a DatasetDict with the keys \['train'\]"):
        ids(DatasetDict(train=Dataset.from_list([text()])), tiny_tokenizer())


BAD = {
    "no chosen": (
        {"prompt": "w1", "answers": "w2"},
        r"has values in the columns \['answers', 'prompt'\], but needs chosen and rejected",
    ),
    "null": (text(rejected=None), r"has values in the columns \['chosen', 'prompt'\], but needs"),
    "kinds": (
        talk() | {"prompt": "w1"},
        "prompt is a string, chosen is a list of messages, rejected is a list of messages, but all",
    ),
    "kinds of answers": (talk() | {"chosen": "w3"}, "chosen is a string, rejected is a list of m"),
    "strings in a list": (
        talk() | {"chosen": ["w3"]},
        r"chosen is a list \(not of messages\), rejected is a list of mess",
    ),
    "no prompt message": (talk() | {"prompt": []}, "has no message before the answers"),
    "nothing in common": (
        {name: value for name, value in talk().items() if name != "prompt"},
        "has no message before the answers, but needs one",
    ),
    "no answer": (talk() | {"rejected": []}, "rejected has no token beyond the prompt"),
    "tools": (talk(tools="[{"), r"tools is '\[\{' and chat_template_kwargs \{\}, but they must be"),
    "options": (talk(chat_template_kwargs="style"), "chat_template_kwargs 'style', but they must"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_examples_are_named(jsonl, kind):
    example, message = BAD[kind]
    with pytest.raises(ValueError, match=f"^example 1.*{message}"):
        ids([text(), example], tokenizer_with())
    with pytest.raises(ValueError, match=rf"pairs\.jsonl, line 2.*{message}"):
        ids(jsonl([text(), example]), tokenizer_with())


@pytest.mark.parametrize("num_proc", [None, 2])
def test_bad_examples_of_a_dataset_are_named(num_proc):
    dataset = Dataset.from_list([talk()] * 70 + [talk() | {"chosen": []}])
    with pytest.raises(ValueError, match="example 70: chosen has no token beyond the prompt"):
        ids(dataset, tiny_tokenizer(), num_proc=num_proc)


def test_name_of_a_tokenizer():
    with pytest.raises(TypeError, match="tokenizer is 'some/name', a string, but must be"):
        ids([text()], "some/name")


def test_examples_that_are_no_mapping(jsonl):
    with pytest.raises(TypeError, match="example 1 is a str, but must be a mapping"):
        ids([text(), "w1"], tiny_tokenizer())
    with pytest.raises(TypeError, match=r"pairs\.jsonl, line 1 is a list, but must be a mapping"):
        ids(jsonl(["[{}]"]), tiny_tokenizer())


def test_tokenizers_that_lack_something():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no EOS token.*set tokenizer\.eos_token"):
        ids([text()], tokenizer)
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template is not set"):
        ids([talk()], tokenizer)


def test_errors_of_the_template_name_the_example():
    template = TEMPLATE + "{{ raise_exception('no w7 here') if messages[0]['content'] == 'w7' }}"
    with pytest.raises(ValueError, match=r"does not take example 2 \(no w7 here\); change"):
        ids([talk(), talk(), talk("w7"), talk()], tokenizer_with(template))


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_warning_of_missing_prompts(kind):
    """Another name of the prompt column would otherwise go unnoticed."""
    examples = [
        {"question": "w1 w2", "chosen": "w3", "rejected": "<unk>"},
        {"question": "w1 w2", "chosen": "w1 w2 w3", "rejected": "w1 w2 <unk>"},
    ]
    data = Dataset.from_list(examples) if kind == "dataset" else examples
    with pytest.warns(UserWarning, match=r"1 of 2 examples have no prompt: .* rename it to prompt"):
        tokenize_preferences(data, tiny_tokenizer(), progress=False)
