"""Files and folders of preference pairs: their examples, each with the place it comes from.

Knows formats, and nothing of what an example must hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_LINES = (".jsonl", ".ndjson")
_KNOWN = (*_LINES, ".json", ".parquet")

Items = Sequence[tuple[str, Any]]
"""Examples, each with the words that name its place in a message."""


def read_file(path: Path) -> Items:
    """Examples of a JSONL, JSON or Parquet file.

    A `.json` file holds an array of objects, or one object a line, as a `.jsonl` file does.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: a Parquet file, but `pyarrow` is not installed.
        ValueError: a file of another kind, one that is not what its name says, or one that was
            written in part, with the line where it ends.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a JSONL, JSON or Parquet file, a folder saved by "
            "datasets, or examples themselves (datasets.load_dataset returns those of a name on "
            "the hub, and .to_json('pairs.jsonl') of one split writes them to a file)"
        )
    kind = path.suffix.lower()
    if kind not in _KNOWN:
        raise ValueError(
            f"{path} is not JSONL, JSON or Parquet by its name, but only these "
            f"({', '.join(_KNOWN)}) and folders saved by datasets are read; load it with "
            "datasets.load_dataset, of 'csv' or its other kinds, and give the result, or write it "
            "to a file by .to_json('pairs.jsonl')"
        )
    if kind == ".parquet":
        return _parquet(path)
    return _array(path) if kind == ".json" and _begins_array(path) else _lines(path)


def read_folder(folder: Path) -> Any:
    """The `Dataset` that `datasets` saved in a folder, or its train split.

    Raises:
        FileNotFoundError: a folder that `datasets` did not save.
        ModuleNotFoundError: `datasets` is not installed.
        ValueError: no example, several splits and none of them "train", or files written in part.
    """
    if find_spec("datasets") is None:
        raise ModuleNotFoundError(
            f"{folder} is a folder, which takes datasets to read, but that is not installed; run "
            "`pip install datasets`, or give a JSONL file"
        )
    from datasets import DatasetDict, load_from_disk  # type: ignore[import-untyped]

    try:
        saved = _whole(folder, lambda: load_from_disk(folder), "save it again with save_to_disk")
    except IndexError:  # of no files
        raise ValueError(
            f"{folder} holds no example, or a split in it does not, but must hold at least one; "
            "check how it is made"
        ) from None
    if not isinstance(saved, DatasetDict):
        return saved
    if "train" not in saved:
        raise ValueError(
            f"{folder} has the splits {sorted(saved)}, but of several splits 'train' is read; give "
            f"the folder of one, such as {folder / min(saved)}"
        )
    return saved["train"]


def read_pairs(path: Path) -> Items:
    """Examples of a file as `read_file`, or of a folder as `read_folder`."""
    return _Table(path, read_folder(path)) if path.is_dir() else read_file(path)


class _Table(Sequence[tuple[str, Any]]):
    """Rows of a table; of a folder they are read when they are asked for.

    Args:
        path: where the table is.
        table: `table[i]` is row `i` as a dict.
    """

    def __init__(self, path: Path, table: Any) -> None:
        self._path, self._table = path, table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return f"{self._path}, row {index} (the first is 0)", self._table[index]


def _lines(path: Path) -> Items:
    items = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                items.append((where, json.loads(line)))  # bytes may begin with a byte order mark
            except ValueError as error:
                raise ValueError(
                    f"{where} is not JSON in UTF-8, or was written in part ({error}), but a line "
                    "must be one JSON object; repair or remove it"
                    + (", or make the whole an array of objects" if path.suffix == ".json" else "")
                ) from None
    return items


def _begins_array(path: Path) -> bool:
    with path.open("rb") as file:
        lines = (line.removeprefix(b"\xef\xbb\xbf").strip() for line in file)
        return next(filter(None, lines), b"").startswith(b"[")


def _array(path: Path) -> Items:
    text = path.read_bytes()
    try:
        array = json.loads(text)
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line} is not UTF-8 ({error}); write the file in UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno} is not JSON, or the file was written in part ({error}), "
            "but it must be one array of objects; repair it there, or write it again"
        ) from None
    return [(f"{path}, item {i} (the first is 0)", example) for i, example in enumerate(array)]


def _parquet(path: Path) -> Items:
    if find_spec("pyarrow") is None:
        raise ModuleNotFoundError(
            f"{path} is a Parquet file, which takes pyarrow to read, but that is not installed; "
            "run `pip install pyarrow`, or give a JSONL file"
        )
    from pyarrow import parquet  # type: ignore[import-untyped]

    table = _whole(path, lambda: parquet.read_table(path), "write or download it again")
    return _Table(path, table.to_pylist())


def _whole(path: Path, read: Callable[[], Any], remedy: str) -> Any:
    """What `read` returns; an error of Arrow's names the path."""
    import pyarrow

    try:
        return read()
    except PermissionError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is no folder that datasets saved, or lacks a file of one ({error}); give the "
            f"folder that save_to_disk wrote, or {remedy}"
        ) from None
    except (pyarrow.ArrowException, OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as what its name says, or was written in part ({error}); "
            f"{remedy}"
        ) from None
