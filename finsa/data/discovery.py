"""Find the files of a data set and the split of each: as ``data.files`` assigns it, or by the names of the files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from finsa.config import ROOT, Data, locate
from finsa.data.readers import READERS
from finsa.errors import DataError, nearest

# Keywords of the datasets library, which count if no letter is next to them. Chinese words need no separator.
_KEYWORDS = {
    "train": r"(?<![a-z])train(?:ing)?(?:set)?(?![a-z])|训练",
    "validation": r"(?<![a-z])(?:valid(?:ation)?|val|dev)(?:set)?(?![a-z])|验证",
    "test": r"(?<![a-z])test(?:ing)?(?:set)?(?![a-z])|测试",
    "eval": r"(?<![a-z])eval(?:uation)?(?:set)?(?![a-z])",
}
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.)")
_PLAIN = ("train", "valid", "validation", "val", "dev", "test")  # file names that need no note
_HUB_FOLDER = "data"  # folder of the tables in repositories on the hub
_ASSIGN = '"data.files={train: <file>, validation: <file>, test: <file>}"'


@dataclass(frozen=True)
class Found:
    """The files of a data set.

    Args:
        splits: files in a fixed order, each with its split; None: its rows are to be split.
        notes: split of each file, and skipped files, unless that is obvious from their names.
    """

    splits: dict[Path, str | None]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Entry:
    """The files of one path of ``data.files``; names of folders count below ``root``."""

    root: Path
    files: list[Path]
    is_folder: bool = False


def find(data: Data) -> Found:
    """Find the files of a data set.

    The split of a file is what ``data.files`` assigns, else what its name says, else what the nearest folder below the
    given one says. Where files of a folder name splits, its other files are skipped.

    Raises:
        DataError: for a missing path, with where the data set comes from; for a folder without tables; or for a file
            whose split is open while others state theirs.
    """
    if not data.files:
        raise DataError(
            f"data.files: data={data.name} needs files; for instance data.files=<folder or file>{origin(data)}"
        )
    if isinstance(data.files, Mapping):
        splits = dict[Path, str | None]()
        for split, paths in data.files.items():
            for file in (file for path in _as_tuple(paths) for file in _expand(path, data).files):
                if splits.setdefault(file, split) != split:
                    raise DataError(f"data.files: {file} is assigned to two splits, {splits[file]} and {split}")
        return Found(splits)
    entries = [_expand(path, data) for path in _as_tuple(data.files)]
    root = Path(os.path.commonpath([entry.root for entry in entries]))
    named = {file: _keywords(file.relative_to(root)) for entry in entries for file in entry.files}
    skipped = list[str]()
    if any(len(words) == 1 for words in named.values()):
        for entry in entries:
            others = {file for file in entry.files if entry.is_folder and not named[file]}
            # A file of another kind than the tables, such as a recipe.json beside them, needs no note.
            kinds = {file.suffix for file in entry.files if file not in others}
            skipped += [
                file.relative_to(entry.root).as_posix()
                for file in entry.files
                if file in others and file.suffix in kinds
            ]
            named = {file: words for file, words in named.items() if file not in others}
        for file, words in named.items():
            if not words:
                raise DataError(
                    f"data.files: {file.name} names no split while others do; call it train, valid or test, or assign "
                    f"every file: {_ASSIGN}"
                )
            if len(words) > 1:
                raise DataError(
                    f"data.files: {file.name} names two splits, {words[0]} and {words[1]}; rename it, or assign every "
                    f"file: {_ASSIGN}"
                )
    _require_all_shards({file for entry in entries if entry.is_folder for file in entry.files})
    # As in the datasets library, eval is the test split, unless another file is named test.
    words_of = {file: words[0] if len(words) == 1 else None for file, words in named.items()}
    given = set(words_of.values())
    evaluation = "validation" if "test" in given and "validation" not in given else "test"
    splits = {file: evaluation if word == "eval" else word for file, word in words_of.items()}
    notes = list[str]()
    for split in ("train", "validation", "test"):
        files = [file for file, assigned in splits.items() if assigned == split]
        if any(file.stem.lower() not in _PLAIN for file in files):
            notes.append(f"{split} split, by file name: {_first([file.name for file in files])}")
    unclear = [file.name for file, words in named.items() if len(words) > 1]
    if unclear:
        notes.append(f"names two splits, so its rows are divided: {_first(unclear)}")
    if skipped:
        notes.append(f"skipped, because it names no split while others do: {_first(skipped)}")
    return Found(splits, notes)


def find_files(data: Data) -> dict[Path, str | None]:
    """The files of a data set with their splits, see `find`."""
    return find(data).splits


def origin(data: Data) -> str:
    """Where to get the files of a data set, as the end of a message."""
    return f"\n  data={data.name} is {data.origin}" if data.origin else ""


def _as_tuple(paths: str | Iterable[str]) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else tuple(paths)


def _expand(entry: str, data: Data) -> _Entry:
    path = locate(entry)
    if not path.exists() and any(sign in entry for sign in "*?["):
        matches = glob(entry, recursive=True) or glob(str(ROOT / entry), recursive=True)  # noqa: PTH207 - may be absolute
        files = sorted(Path(match).absolute() for match in matches if Path(match).is_file())
        if not files:
            raise DataError(f"data.files: nothing matches {entry}")
        return _Entry(Path(os.path.commonpath([file.parent for file in files])), files)
    if path.is_dir():
        files = _tables(path)
        if not files:
            raise DataError(f"data.files: no {', '.join(READERS)} file in {path}{origin(data)}")
        return _Entry(path, files, is_folder=True)
    if not path.is_file():
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        hint = f" Did you mean '{path.with_name(near)}'?" if near else ""
        raise DataError(f"data.files: no such file or folder: {path}.{hint}{origin(data)}")
    return _Entry(path.parent, [path])


def _tables(folder: Path) -> list[Path]:
    """The tables in a folder and in its subfolders named after splits; in all subfolders if it has no table itself."""
    entries = sorted(folder.iterdir())
    # Names that begin with . or ~$ were left behind by editors and systems.
    tables = [
        file
        for file in entries
        if file.suffix.lower() in READERS and not file.name.startswith((".", "~$")) and file.is_file()
    ]
    below = [sub for sub in entries if sub.is_dir() and not sub.name.startswith((".", "__"))]
    if tables:
        named = any(_keywords(Path(file.name)) for file in tables)
        below = [sub for sub in below if _keywords(Path(sub.name)) or (sub.name == _HUB_FOLDER and not named)]
    return [*tables, *(file for sub in below for file in _tables(sub))]


def _keywords(path: Path) -> list[str]:
    """The splits that a path names: those of its file name, else of its nearest folder that names any."""
    for part in (path.stem, *reversed(path.parent.parts)):
        spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", part).lower()  # fpbTrain
        words = [word for word, pattern in _KEYWORDS.items() if re.search(pattern, spaced)]
        if "eval" in words and ("validation" in words or "test" in words):
            words.remove("eval")
        if words:
            return words
    return []


def _require_all_shards(files: set[Path]) -> None:
    """Refuse a folder that lacks shards, such as train-00001-of-00002 beside train-00000-of-00002.

    Raises:
        DataError: naming the first that is missing.
    """
    for file in sorted(files):
        shard = _SHARD.search(file.name)
        if shard is None:
            continue
        before, after, total = file.name[: shard.start(1)], file.name[shard.end(1) :], int(shard[2])
        shards = [file.with_name(f"{before}{number:0{len(shard[1])}}{after}") for number in range(total + 1)]
        wanted = shards[1:] if shards[total] in files else shards[:total]  # counted from 1, or from 0 as usual
        missing = next((other.name for other in wanted if other not in files), None)
        if missing is not None:
            raise DataError(
                f"data.files: {missing} is missing beside {file.name}; download it too, or rename the files if they "
                "are not parts of one"
            )


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
