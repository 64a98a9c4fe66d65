"""Files and folders of pairs: the same examples from every format, and broken ones named."""

import json
import sys

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet
from tiny_trl import preference_pairs, tiny_tokenizer

from hf_prefix_patch import tokenize_preferences
from hf_prefix_patch.pair_files import read_pairs

PAIRS = preference_pairs(4).to_list()
BAD = {"prompt": "w1", "chosen": "w2", "rejected": None}


def write(path, examples):
    """The examples in the format that the name says."""
    if path.name == "saved":
        Dataset.from_list(examples).save_to_disk(path)
    elif path.name == "splits":
        splits = {"test": Dataset.from_list(examples[:1]), "train": Dataset.from_list(examples)}
        DatasetDict(splits).save_to_disk(path)
    elif path.suffix.lower() == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(examples), path)
    elif path.name == "array.json":
        path.write_text(json.dumps(examples, indent=1))
    elif path.name == "mark.json":  # as some editors begin a file
        path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(examples).encode())
    else:
        path.write_text("\n\n".join(map(json.dumps, examples)))
    return path


NAMES = ["a.jsonl", "a.ndjson", "lines.json", "array.json", "mark.json", "a.parquet", "A.PARQUET"]
FOLDERS = ["saved", "splits"]


@pytest.mark.parametrize("name", NAMES + FOLDERS)
def test_every_format_has_the_same_examples(tmp_path, name):
    items = read_pairs(write(tmp_path / name, PAIRS))
    assert len(items) == len(PAIRS)
    assert [example for _, example in items] == PAIRS
    where, example = items[2]
    assert example == PAIRS[2]
    assert where.startswith(str(tmp_path / name))
    assert list(items[1:3]) == [items[1], items[2]]


@pytest.mark.parametrize("name", NAMES + FOLDERS)
def test_tokens_are_the_same(tmp_path, name):
    tokenizer = tiny_tokenizer()
    want = tokenize_preferences(PAIRS, tokenizer, progress=False)
    path = write(tmp_path / name, PAIRS)
    assert tokenize_preferences(path, tokenizer, progress=False) == want


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("a.jsonl", "line 3"),
        ("lines.json", "line 3"),
        ("array.json", r"item 1 \(the first is 0\)"),
        ("a.parquet", r"row 1 \(the first is 0\)"),
    ],
)
def test_bad_examples_are_named(tmp_path, name, place):
    good = {"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}
    path = write(tmp_path / name, [good, BAD])
    with pytest.raises(ValueError, match=f"{name}, {place} has values in the columns"):
        tokenize_preferences(path, tiny_tokenizer(), progress=False)


def test_arrays_written_in_part(tmp_path):
    path = write(tmp_path / "array.json", PAIRS)
    whole = path.read_text()
    lines = whole.count("\n") + 1
    path.write_text(whole[: whole.rindex("]") - 1])
    with pytest.raises(
        ValueError,
        match=rf"array\.json, line {lines - 1} is not JSON, or the file was written in p",
    ):
        read_pairs(path)
    path.write_bytes(b'[\n{"prompt": "\xe9"}]')
    with pytest.raises(ValueError, match=r"array\.json, line 2 is not UTF-8.*write the file in"):
        read_pairs(path)


def test_objects_over_several_lines_are_no_lines(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(PAIRS[0], indent=1))
    with pytest.raises(ValueError, match=r"pairs\.json, line 1 .*or make the whole an array"):
        read_pairs(path)
    path.write_text(" \n\n")
    assert len(read_pairs(path)) == 0


@pytest.mark.parametrize("kept", [0, 100, -20])
def test_parquet_written_in_part(tmp_path, kept):
    path = write(tmp_path / "a.parquet", PAIRS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read .*written in part .*again"):
        read_pairs(path)


def test_folders_written_in_part(tmp_path):
    path = write(tmp_path / "saved", PAIRS)
    (table,) = path.glob("*.arrow")
    table.write_bytes(table.read_bytes()[:-400])
    with pytest.raises(ValueError, match=r"saved cannot be read .*written in part .*save_to_disk"):
        read_pairs(path)
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks a file of one .*give the folder that save"):
        read_pairs(path)
    state = path / "state.json"
    state.write_text(state.read_text()[:9])
    with pytest.raises(ValueError, match=r"saved cannot be read .*written in part .*save_to_disk"):
        read_pairs(path)


@pytest.mark.parametrize("name", ["a.parquet", "saved", "splits"])
def test_tables_without_examples(tmp_path, name):
    path = tmp_path / name
    empty = Dataset.from_list(PAIRS).select([])
    if name == "a.parquet":
        empty.to_parquet(path)
    elif name == "saved":
        empty.save_to_disk(path)
    else:
        DatasetDict(train=Dataset.from_list(PAIRS), test=empty).save_to_disk(path)
    with pytest.raises(ValueError, match=rf"{name} holds no example"):
        tokenize_preferences(path, tiny_tokenizer(), progress=False)


def test_formats_that_take_a_package(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", PAIRS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("hf_prefix_patch.pair_files.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"a\.parquet is a Parquet .*pip install pyarrow"):
        read_pairs(path)
    with pytest.raises(ModuleNotFoundError, match=r"is a folder.*pip install datasets"):
        read_pairs(tmp_path)


def test_names_that_say_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist; give a JSONL, JSON"):
        read_pairs(tmp_path / "none.json")
    path = tmp_path / "pairs.csv"
    path.touch()
    with pytest.raises(ValueError, match=r"pairs\.csv is not JSONL, JSON or Parquet by its name"):
        read_pairs(path)
