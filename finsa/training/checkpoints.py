"""Sealed checkpoints: each is written completely or not at all, and its SHA-256 checksums are verified before use.

``checkpoint-<step>/`` is what transformers writes, with ``manifest.json``, which has the checksums and the state of a
training besides weights, optimiser and schedule: tokens, the loss that has not been logged yet, the length of the log.
``epoch/`` has the random states at the beginning of the epoch, from which the order of its rows is drawn.
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
    """The state of a training that transformers does not save.

    Args:
        over: no step follows, because patience has run out.
        tokens: real tokens trained on.
        seconds: wall time so far.
        open_loss: sum of the losses since the last log record.
        logged_loss: sum of those before.
        logged_step: of the last log record.
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
        best: folder of the best one up to it, verified as well; None if nothing was validated yet.
    """

    path: Path
    best: Path | None
    progress: Progress


def seal(folder: Path, progress: Progress) -> None:
    """Write the manifest of a checkpoint's folder, last."""
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
    """The newest checkpoint that is intact, and whose best one is; what a kill left behind is removed.

    Args:
        folder: of the checkpoints; it may be missing.
        report: takes a message for each checkpoint that is skipped.
    """
    files.clear(folder)
    places = numbered(folder)
    for place in reversed(places):
        wrong = fault(place)
        best = None if wrong else _best(place)
        if wrong is None and best not in (None, place) and best is not None and fault(best):
            wrong = f"its best one, {best.name}, is not intact: {fault(best)}"
        if wrong is None:
            known = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
            return Checkpoint(place, best, Progress(**known["progress"]))
        report(f"{place} is skipped: {wrong}")
    if places:
        report(f"no checkpoint in {folder} can be used; training starts from the beginning")
    return None


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the oldest first."""
    places = [place for place in folder.glob("checkpoint-*") if place.name.rpartition("-")[2].isdigit()]
    return sorted(places, key=lambda place: int(place.name.rpartition("-")[2]))


def rewind(log: Path, folder: Path, checkpoint: Checkpoint | None) -> None:
    """Truncate a log to its length at a checkpoint; if there is none, to its length when the training began.

    Args:
        log: may be missing.
        folder: of the checkpoints; it also records the length of the log when a training first begins.
        checkpoint: the one to resume from.
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
    """Keep the best checkpoint and the newest ones, `keep` in all and at least the best and the newest.

    One with a later step than `newest` was damaged, and skipped when the training was resumed from before it.
    """
    places = numbered(folder)
    earlier = places[: places.index(newest) + 1]
    kept = [newest, *([best] if best in earlier and best != newest else [])]
    kept += [place for place in reversed(earlier) if place not in kept][: max(0, keep - len(kept))]
    for place in places:
        if place not in kept:
            files.remove(place)
