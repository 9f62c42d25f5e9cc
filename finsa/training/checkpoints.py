"""Sealed checkpoints: each is written atomically, and its SHA-256 checksums are verified before use.

``checkpoint-<step>/`` is a checkpoint of transformers with a ``manifest.json``, which contains the checksums and the
training state besides weights, optimizer and schedule: tokens, the loss not logged yet, the length of the log.
``epoch/`` contains the random states at the beginning of the epoch, which determine the order of its rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from finsa.runs import files

MANIFEST = "manifest.json"
EPOCH = "epoch"
STATE = "trainer_state.json"


@dataclass(frozen=True)
class Progress:
    """Training state that transformers does not save.

    Args:
        over: training has been stopped early.
        tokens: real tokens trained on.
        seconds: wall time so far.
        open_loss: sum of the losses since the last log record.
        logged_loss: sum of those before.
        logged_step: step of the last log record.
        log_bytes: length of ``log.jsonl``.
    """

    over: bool
    tokens: int
    seconds: float
    open_loss: float
    logged_loss: float
    logged_step: int
    log_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Args:
        path: its folder.
        best: folder of the best checkpoint so far, verified as well; None before the first validation.
    """

    path: Path
    best: Path | None
    progress: Progress


def seal(folder: Path, progress: Progress) -> None:
    """Write the manifest of a complete checkpoint."""
    content = {"files": files.digests(folder), "progress": asdict(progress)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is unchanged since it was sealed."""
    try:
        known = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return "it is incomplete" if folder.is_dir() else "it is missing"
    except (ValueError, LookupError, TypeError):
        return f"{MANIFEST} is damaged"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    try:
        digests = files.digests(folder)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    digests.pop(MANIFEST)
    wrong = sorted(name for name in known | digests if known.get(name) != digests.get(name))
    return f"{wrong[0]} is missing or damaged" if wrong else None


def newest(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is intact and whose best checkpoint is intact; leftovers of a kill are removed.

    Args:
        folder: of the checkpoints; may be missing.
        report: receives a message for each skipped checkpoint.
    """
    files.clear(folder)
    places = numbered(folder)
    for place in reversed(places):
        wrong = fault(place)
        best = None if wrong else _best(place)
        if wrong is None and best not in (None, place) and best is not None and fault(best):
            wrong = f"the best checkpoint, {best.name}, is not intact: {fault(best)}"
        if wrong is None:
            known = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
            return Checkpoint(place, best, Progress(**known["progress"]))
        report(f"{place} is skipped: {wrong}")
    if places:
        report(f"no checkpoint in {folder} can be used; training starts from the beginning")
    return None


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    places = [place for place in folder.glob("checkpoint-*") if place.name.rpartition("-")[2].isdigit()]
    return sorted(places, key=lambda place: int(place.name.rpartition("-")[2]))


def rewind(log: Path, folder: Path, checkpoint: Checkpoint | None) -> None:
    """Truncate a log to its length at a checkpoint; if there is none, to its length at the beginning of the training.

    Args:
        log: may be missing.
        folder: of the checkpoints; the length of the log at the beginning of the training is stored here.
        checkpoint: to resume from; None: from the beginning.
    """
    size, begins = log.stat().st_size if log.is_file() else 0, folder / "log_begins"
    if not begins.is_file():
        with files.replacing(begins) as temporary:
            temporary.write_text(f"{size}\n")
        return
    end = checkpoint.progress.log_bytes if checkpoint else int(begins.read_text())
    if size > end:
        with log.open("r+b") as stream:
            stream.truncate(end)


def _best(place: Path) -> Path | None:
    step = json.loads((place / STATE).read_text(encoding="utf-8")).get("best_global_step")
    return place.with_name(f"checkpoint-{step}") if step else None


def rotate(folder: Path, keep: int, best: Path | None, newest: Path) -> None:
    """Keep the best checkpoint and the newest ones, `keep` in total, but at least the best and the newest one.

    A checkpoint with a later step than `newest` is damaged: training was resumed from an earlier one.
    """
    places = numbered(folder)
    earlier = places[: places.index(newest) + 1]
    kept = [newest, *([best] if best in earlier and best != newest else [])]
    kept += [place for place in reversed(earlier) if place not in kept][: max(0, keep - len(kept))]
    for place in places:
        if place not in kept:
            files.remove(place)
