"""The files that a source names: which of them are read, and which are another split's or not data."""

import glob
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from custom_components.datasets.file_readers import FILE_KINDS, file_kind, num_rows_of_file
from custom_components.datasets.summary import counted
from custom_components.runtime.errors import UserError

# The splits that a name stands for, and what separates it from the rest of a file's name; a folder may also have files
# such as `data/train_sft-00000-of-00002.parquet`: huggingface/datasets, src/datasets/data_files.py, SPLIT_KEYWORDS.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in _SPLITS.items() for word in words}
_BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")
_HUB_FILE = re.compile(r"(.+)-\d{5}-of-\d{5}")
_HUB_FOLDER = "data"
# What a folder of data may hold beside it: huggingface/datasets, src/datasets/data_files.py, FILES_TO_IGNORE, and
# src/datasets/config.py.
_NO_DATA_NAMES = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "config.json"}
_NO_DATA = re.compile(r"(readme|licen[sc]e|copying|notice|citation|changelog)\b.*|.*\.md", re.IGNORECASE)
_SAVED_STATE = "state.json"  # of Dataset.save_to_disk
_NUM_NAMES_SHOWN = 4


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source.

    Attributes:
        paths: those that are read, in this order.
        account: which of a folder's or glob's files are read and which are not, and why; "" for a single file.
    """

    paths: tuple[Path, ...]
    account: str = ""


@dataclass(frozen=True)
class _Entry:
    """A file or folder that a source holds: of a split or of none, or why it is no data."""

    name: str
    path: Path
    split: str | None = None
    no_data: str | None = None


def is_on_hub(source: str) -> bool:
    """Whether a source is a data set's name on the hub, and not files that are here or should be."""
    if source.count("/") != 1:
        return False
    path = Path(source)
    is_path = path.exists() or glob.has_magic(source) or file_kind(path) in FILE_KINDS
    return not is_path and all(source.split("/")) and not source.startswith(("~", "."))


def source_files(source: str, split: str, key: str) -> SourceFiles:
    """Find the files of a source that is not on the hub.

    Args:
        source: a file, a folder or a glob. A folder, and a glob whose files name several splits, is read as its splits.
        split: the one to read, or several joined by `+`, such as `train+validation`. Files that name no split are
            `train`, unless another file is.
        key: what errors call the source.

    Raises:
        UserError: there is no such file or split, no file of a kind that is read, or a folder cannot be read.
    """
    try:
        return _source_files(source, Path(source).expanduser(), split, key)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{key}: {source[:80]!r} cannot be read ({reason})") from None


def _source_files(source: str, path: Path, split: str, key: str) -> SourceFiles:
    if re.search(r"[\[\]%:]", split):
        raise UserError(
            f"{_beside(key, 'split')}: {split!r}: slices are for data sets on the hub; "
            f"of files take the first rows with {_beside(key, 'max_rows')}"
        )
    if path.is_dir():
        entries = [*_folder_entries(path, path)]
        what = f"the folder {source!r}"
    elif glob.has_magic(source) and not path.exists():
        entries = _glob_entries(path)
        if not entries:
            raise UserError(f"{key}: no file matches {source!r}")
        what = f"{source!r}"
    else:
        return SourceFiles((_single_file(path, source, split, key),))
    data = [entry for entry in entries if entry.no_data is None]
    if not data:
        names = ", ".join(entry.name for entry in entries[:8]) or "nothing"
        raise UserError(
            f"{key}: {what} has no {', '.join(FILE_KINDS)} file, but {names}; "
            "for files in its folders name one of them, or a glob such as 'data/**/*.jsonl'"
        )
    splits = {entry.split for entry in data}
    if not path.is_dir() and len(splits) == 1 and (split == "train" or splits == {split}):
        chosen = data  # named by the glob as a single file is by its path
    else:
        chosen = [entry for part in split.split("+") for entry in _of_split(data, part, what, key)]
    return SourceFiles(tuple(entry.path for entry in chosen), _account(chosen, entries))


def _single_file(path: Path, source: str, split: str, key: str) -> Path:
    if not path.exists():
        raise UserError(f"{key}: there is no file {source!r}")
    if not path.is_file():
        raise UserError(f"{key}: {source!r} is not a file")
    if file_kind(path) not in FILE_KINDS:
        raise UserError(f"{key}: {source!r} is not a {', '.join(FILE_KINDS)} file")
    if split != "train" and not _is_split(_split_of_name(path.name), split):
        raise UserError(
            f"{_beside(key, 'split')}: {split!r}: the file {source!r} has no splits; name the file of that split, "
            "or the folder of all"
        )
    return path


def _folder_entries(folder: Path, root: Path, split: str | None = None) -> Iterator[_Entry]:
    """List what is in a folder, and in those of its folders that are named after a split or `data`."""
    saved = _saved_names(folder)
    for path in sorted(folder.iterdir()):
        name = str(path.relative_to(root))
        if path.name.startswith(".") or path.name in _NO_DATA_NAMES or _NO_DATA.fullmatch(path.name):
            continue
        if path.is_dir():
            inner_split = split or (path.name if (path / _SAVED_STATE).exists() else _split_of_name(path.name))
            if inner_split is not None or (path.name == _HUB_FOLDER and folder == root):
                yield from _folder_entries(path, root, inner_split)
            else:
                yield _Entry(f"{name}/", path, no_data="a folder of its own")
        elif saved is not None and path.name not in saved:
            yield _Entry(name, path, no_data="not of the saved data set")
        else:
            hub_file = _HUB_FILE.match(path.name) if path.parent.name == _HUB_FOLDER else None
            yield _file_entry(name, path, split or (hub_file[1] if hub_file else _split_of_name(path.name)))


def _glob_entries(pattern: Path) -> list[_Entry]:
    parts = pattern.parts
    fixed = Path(*parts[: next(index for index, part in enumerate(parts) if glob.has_magic(part))])
    names = sorted(glob.glob(str(pattern), recursive=True))  # noqa: PTH207 - Path.glob raises on 'data/**.jsonl'
    entries = []
    for path in map(Path, names):
        if path.is_dir() or path.name in _NO_DATA_NAMES or _NO_DATA.fullmatch(path.name):
            continue
        below = path.relative_to(fixed)
        splits = [split for part in below.parts if (split := _split_of_name(part)) is not None]
        entries.append(_file_entry(str(below), path, splits[0] if splits else None))
    return entries


def _file_entry(name: str, path: Path, split: str | None) -> _Entry:
    if not path.is_file():
        return _Entry(name, path, no_data="a link to nothing" if path.is_symlink() else "not a file")
    if file_kind(path) not in FILE_KINDS:
        return _Entry(name, path, no_data="not a kind of file that is read")
    return _Entry(name, path, split)


def _saved_names(folder: Path) -> set[str] | None:
    """The files of a saved data set; `datasets` also keeps those of its cache in the folder."""
    try:
        state = json.loads((folder / _SAVED_STATE).read_text(encoding="utf-8"))
        return {file["filename"] for file in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _split_of_name(name: str) -> str | None:
    """Give the split that a file's or folder's name has as a word; None if it has none or several."""
    words = [word for word in _BETWEEN_WORDS.split(name.lower()) if word in _SPLIT_OF_WORD]
    return words[0] if len({_SPLIT_OF_WORD[word] for word in words}) == 1 else None


def _is_split(name: str | None, wanted: str) -> bool:
    return name is not None and (name == wanted or _SPLIT_OF_WORD.get(name, name) == _SPLIT_OF_WORD.get(wanted))


def _of_split(data: Iterable[_Entry], wanted: str, what: str, key: str) -> list[_Entry]:
    found = [entry for entry in data if entry.split == wanted] or [
        entry for entry in data if _is_split(entry.split, wanted)
    ]
    if not found and _is_split("train", wanted):
        found = [entry for entry in data if entry.split is None]
    if found:
        return found
    splits = [*dict.fromkeys(entry.split for entry in data if entry.split is not None)]
    if not splits:
        raise UserError(f"{_beside(key, 'split')}: {wanted!r}: no file of {what} names a split; set it to train")
    raise UserError(
        f"{_beside(key, 'split')}: {wanted!r} is not a split of {what}; it has {', '.join(splits)}: "
        f"set {_beside(key, 'split')} to one of these"
    )


def _beside(key: str, name: str) -> str:
    """`dataset.split` for `dataset.source`."""
    return f"{key.rpartition('.')[0]}.{name}".removeprefix(".")


def _account(chosen: list[_Entry], entries: Iterable[_Entry]) -> str:
    by_reason: dict[str, list[_Entry]] = {}
    for entry in entries:
        if entry not in chosen:
            reason = entry.no_data or (f"split {entry.split}" if entry.split else "names no split")
            by_reason.setdefault(reason, []).append(entry)
    left_out = "".join(f", not {_listed(left)} ({reason}{_rows_of(left)})" for reason, left in by_reason.items())
    return f"reads {_listed(chosen)}{left_out}"


def _rows_of(left_out: list[_Entry]) -> str:
    """Say how many rows files of data have, if that is quickly counted."""
    if any(entry.no_data for entry in left_out):
        return ""
    counts = [num_rows_of_file(entry.path) for entry in left_out]
    known = [count for count in counts if count is not None]
    return f", {counted(sum(known), 'row')}" if len(known) == len(counts) else ", rows not counted"


def _listed(entries: list[_Entry]) -> str:
    names = [entry.name for entry in entries]
    if len(names) <= _NUM_NAMES_SHOWN:
        return ", ".join(names)
    return f"{len(names)} files, {names[0]} to {names[-1]}"
