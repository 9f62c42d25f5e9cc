"""Run folders: the record of a run, complete or marked as failed; every file is written atomically.

A folder contains ``config.yaml`` (resolved), ``run.json`` (status, provenance), ``ledger.json``, ``log.jsonl``,
``metrics.json``, ``predictions.jsonl``, ``adapters/<domain>/``, ``checkpoints/`` and figures.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from finsa.config import MoeJointStage, RunConfig, locate, migration, safety
from finsa.errors import Pruned, RunError, Stopped, suggest
from finsa.runs import files, locks, processes, provenance
from finsa.session import Session, current_job

JOB = "job.json"  # record of a job of a sweep
NAMED = ("latest", "default")  # names of runs that stage=serve resolves
EXPORTED = "exported_run.json"  # copy of run.json in an export; as run.json it would count as another run


@dataclass(frozen=True)
class Result:
    """What a stage returns.

    Args:
        stage: its name.
        run_dir: the run folder; None for a stage that writes none.
        metrics: the contents of ``metrics.json``.
        objective: the score that a sweeper may maximize; of the validation split, never of the test split.
    """

    stage: str
    run_dir: Path | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    objective: float | None = None


@dataclass
class RunFolder:
    """A run folder that is being written.

    Args:
        path: the folder.
        facts: contents of ``run.json``; `note` adds to them.
    """

    path: Path
    facts: dict[str, Any]

    def note(self, **facts: Any) -> None:
        """Add facts to ``run.json``."""
        self.facts.update(facts)
        self.write_json("run.json", self.facts)

    def write_json(self, name: str, values: Any) -> None:
        """Write a JSON file atomically; NaN, which JSON does not have, becomes null."""
        self.write_text(name, json.dumps(_defined(values), ensure_ascii=False, indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file atomically; with several processes, process 0 writes."""
        if processes.is_main():
            files.write_text(self.path / name, text)

    def write_lines(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Write JSON lines atomically; the records need not fit into memory."""
        if not processes.is_main():
            return
        with (
            files.replacing(self.path / name) as temporary,
            temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,
        ):
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    @property
    def log_file(self) -> Path:
        """``log.jsonl``, appended to; `fit` truncates it to its length at the checkpoint that it resumes from."""
        return self.path / "log.jsonl"

    def log(self, step: int, record: dict[str, float]) -> None:
        """Append a record to ``log.jsonl``, without values that are not defined (NaN)."""
        if not processes.is_main():
            return
        with self.log_file.open("a", encoding="utf-8") as file:
            known = {name: value for name, value in _defined(record).items() if value is not None}
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **known}) + "\n")


def _defined(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _defined(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_defined(value) for value in values]
    return None if isinstance(values, float) and math.isnan(values) else values


@contextmanager
def start(
    cfg: RunConfig, data_fingerprint: str | None, session: Session, named: RunConfig | None = None
) -> Iterator[RunFolder]:
    """Open a run folder; on exit it is marked complete, stopped, pruned, or failed with the error.

    With ``resume=true`` it is the newest unfinished folder of the same configuration.

    Args:
        cfg: the configuration.
        data_fingerprint: of the rows, which must be unchanged for a run to be resumed; None for stages without rows.
        session: determines the location of the folder.
        named: the configuration whose method, model and data are in the name of the folder, if it is not `cfg`.

    Raises:
        RunError: if there is nothing to resume, or the data have changed since.
    """
    if not processes.is_main():
        folder = RunFolder(Path(processes.broadcast(None)), {})
        session.run_folders.append(folder.path)
        yield folder
        return
    path = to_resume(cfg, data_fingerprint, session) if cfg.resume else _new_path(cfg, named or cfg, session)
    path.mkdir(parents=True, exist_ok=True)
    with locks.held(path / locks.LOCK, f"run folder {path}"):
        folder = _opened(cfg, path, data_fingerprint, session)
        session.run_folders.append(path)
        processes.broadcast(str(path))
        started = time.monotonic()
        try:
            yield folder
        except BaseException as error:
            status = "pruned" if isinstance(error, Pruned) else "stopped" if isinstance(error, Stopped) else "failed"
            with suppress(OSError):  # the disk may be full; the error itself is more important
                text = safety.masked(f"{type(error).__name__}: {error}")[:2000]
                folder.note(status=status, error=text, wall_seconds=_wall_seconds(folder, started))
            raise
        if any("unknown" in files.values() for files in folder.facts["base_weights"].values()):
            folder.note(base_weights=starting_weights(cfg))  # a branch of the hub, downloaded by now
        folder.note(
            status="complete",
            error=None,
            weights=provenance.weights(path),
            wall_seconds=_wall_seconds(folder, started),
            peak_memory_bytes=provenance.peak_memory(),
            finished=datetime.now().astimezone().isoformat(timespec="milliseconds"),
        )


def _wall_seconds(folder: RunFolder, started: float) -> float:
    """Seconds of all sittings: those before this one, and those since `started`."""
    return round(float(folder.facts["wall_seconds"]) + time.monotonic() - started, 2)


def _earlier_seconds(path: Path, known: dict[str, Any]) -> float:
    """Seconds of the earlier sittings of a run; one that was killed lasted until its last file was written."""
    seconds = float(known.get("wall_seconds") or 0)
    if known.get("status") == "running" and "started" in known:
        last = max(file.stat().st_mtime for file in path.glob("*.json*"))
        seconds += max(0.0, last - datetime.fromisoformat(known["started"]).timestamp())
    return round(seconds, 2)


def _opened(cfg: RunConfig, path: Path, data_fingerprint: str | None, session: Session) -> RunFolder:
    """Record the start of a run, or of its resumption."""
    known = _read_json(path / "run.json")
    if known.get("status") == "complete" and known.get("config_hash") == config_hash(cfg):
        raise RunError(f"run folder {path} has just been finished by another process")
    if known.get("data_fingerprint", data_fingerprint) != data_fingerprint:
        raise RunError(f"resume: the rows have changed since {path} was started; run the command without resume=true")
    base, changes = starting_weights(cfg), provenance.changes(known) if known else []
    if other := other_weights(known, base):
        text = f"resume: weights have changed since {path} was started ({other[0]})"
        raise RunError(f"{text}; run the command without resume=true")
    if changes:
        print(f"{path} is resumed, although it was started with a different setup: {'; '.join(changes)}", flush=True)
    facts = {
        **known,
        **provenance.of(cfg),
        "command": [*(f"--config-dir={added}" for added in session.folders), *session.overrides],
        "base_weights": base,
        "resumed_with": changes,
        "config_hash": config_hash(cfg),
        "data_fingerprint": data_fingerprint,
        "status": "running",
        "sittings": known.get("sittings", 0) + 1,
        "wall_seconds": _earlier_seconds(path, known),
    }
    folder = RunFolder(path, facts)
    written = yaml.safe_dump(cfg.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
    folder.write_text("config.yaml", f"# finsa {facts['versions']['finsa']}\n{written}")
    folder.note()
    return folder


def _new_path(cfg: RunConfig, named: RunConfig, session: Session) -> Path:
    if session.parent is not None:
        return session.parent.path
    if session.job is not None and session.job.sweep_dir is not None and not session.own_folders:
        return session.job.output_dir
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    name = "_".join([stamp, cfg.stage.name, named.method.name, named.model.name, named.data.title])
    base = Path(cfg.output_dir).absolute() / name
    path, number = base, 1
    while True:
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # try to create it first: another process may do so at the same time
            number += 1
            path = base.with_name(f"{base.name}_{number}")
        else:
            return path


def starting_weights(cfg: RunConfig) -> dict[str, dict[str, str]]:
    """Fingerprints of all weights that a run starts from: base model, initial adapter, evaluated run, experts."""
    if cfg.run in NAMED:
        return {}
    if cfg.run is not None:
        path, known, facts = read(cfg.run)
        return {**provenance.base_weights(known), "run": facts.get("weights") or provenance.model_files(path)}
    named = cfg.stage.experts or {} if isinstance(cfg.stage, MoeJointStage) else {}
    experts = {f"expert {name}": read(place)[2].get("weights") or {} for name, place in named.items() if place}
    return {**provenance.base_weights(cfg), **provenance.adapter_weights(cfg), **experts}


def other_weights(facts: dict[str, Any], now: dict[str, dict[str, str]]) -> list[str]:
    """Describe which of the weights that a run started from have changed; older versions did not record them."""
    recorded: dict[str, dict[str, str]] = facts.get("base_weights") or now
    changes = []
    for role in recorded | now:
        before, after = recorded.get(role, {}), now.get(role, {})
        for name in sorted(before | after):
            # The commit is unknown until the run has downloaded the weights.
            downloaded = before.get(name) == "unknown" and facts.get("status") != "complete"
            if before.get(name) != after.get(name) and not downloaded:
                changes.append(f"{name} of the {role}: {before.get(name)}, now {after.get(name)}")
    return changes


def unfinished(cfg: RunConfig, data_fingerprint: str | None = None) -> Path | None:
    """Find the newest unfinished run of the same configuration below ``output_dir``.

    Args:
        data_fingerprint: skip runs with other rows, weights, code or libraries, and runs in use by another process;
            None: consider them all.
    """

    def fits(path: Path, facts: dict[str, Any]) -> bool:
        if facts.get("status") == "complete" or facts.get("config_hash") != wanted:
            return False
        if data_fingerprint is None:
            return True
        return facts.get("data_fingerprint") == data_fingerprint and not locks.holder(path / locks.LOCK)

    wanted = config_hash(cfg)
    found = _newest(cfg.output_dir, "started", fits, skip_damaged=False)
    if data_fingerprint is None:
        return found[0][0] if found else None
    return _usable(cfg, found, "resumed")


def _usable(cfg: RunConfig, found: list[tuple[Path, dict[str, Any]]], use: str) -> Path | None:
    """Return the first of several runs of one configuration and rows whose weights and code are still the same.

    Args:
        found: folders and facts, newest first.
        use: ``reused`` or ``resumed``, for the message.
    """
    now = starting_weights(cfg) if found else {}
    refused = []
    for path, facts in found:
        weights, changes = other_weights(facts, now), provenance.changes(facts)
        reasons = "; ".join([*weights, *changes])
        if weights or (changes and not cfg.reuse_outdated):
            fix = "" if weights else f"; with reuse_outdated=true it is {use} anyway"
            refused.append(f"{path} is not {use}, because it was run with a different setup: {reasons}{fix}")
            continue
        if changes:
            text = f"{path} is {use} (reuse_outdated=true), although it was run with a different setup: {reasons}"
            print(text, flush=True)
        return path
    if refused:
        print(refused[0], flush=True)
    return None


def to_resume(cfg: RunConfig, data_fingerprint: str | None, session: Session) -> Path:
    """Find the run that ``resume=true`` resumes.

    Raises:
        RunError: if there is none.
    """
    found = unfinished(cfg, data_fingerprint if session.group else None)
    if found is not None:
        return found
    others = sum(facts.get("status") != "complete" for _, facts in _records(cfg.output_dir, skip_damaged=False))
    raise RunError(
        f"resume: no unfinished run of this configuration below {cfg.output_dir} ({others} of other configurations). "
        "Run the same command without resume=true to start one"
    )


def finished(cfg: RunConfig, data_fingerprint: str | None) -> Path | None:
    """Find the newest complete run of the same configuration and rows below ``output_dir``.

    Weights, code, and libraries have to be the same too, unless ``reuse_outdated`` is set; differences are reported.
    Damaged folders are skipped: the run is repeated.
    """
    wanted = {"config_hash": config_hash(cfg), "data_fingerprint": data_fingerprint, "status": "complete"}
    found = _newest(cfg.output_dir, "finished", lambda _, facts: wanted.items() <= facts.items())
    return _usable(cfg, found, "reused")


def latest(output_dir: str) -> Path:
    """Find the newest complete training run below a folder.

    Raises:
        RunError: if there is none.
    """

    def trained(_: Path, facts: dict[str, Any]) -> bool:
        return facts.get("stage") in ("train", "moe_joint") and facts.get("status") == "complete"

    found = _newest(output_dir, "finished", trained)
    if not found:
        raise RunError(f"run=latest: no finished training run below {output_dir}. Train one: python run.py")
    return found[0][0]


def _newest(
    output_dir: str, moment: str, fits: Callable[[Path, dict[str, Any]], bool], skip_damaged: bool = True
) -> list[tuple[Path, dict[str, Any]]]:
    """Runs that fit with their facts, newest first by `moment`, which is ``started`` or ``finished``."""
    found = [(path, facts) for path, facts in _records(output_dir, skip_damaged) if fits(path, facts)]
    return sorted(found, key=lambda run: (_instant(run[1].get(moment)), run[0]), reverse=True)


def _instant(written: Any) -> float:
    """Convert a recorded time to seconds since 1970; local times without offset would be ambiguous."""
    try:
        return datetime.fromisoformat(str(written)).timestamp()
    except ValueError:
        return -math.inf


def _records(output_dir: str, skip_damaged: bool) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Run folders below a folder, with their facts; damaged ones are skipped or an error."""
    for file in Path(output_dir).absolute().rglob("run.json"):
        try:
            facts = _read_json(file)
        except RunError:
            if skip_damaged:
                continue
            raise
        yield file.parent, facts


def config_hash(cfg: RunConfig) -> str:
    """Hash of the part of the configuration that determines the result of a run."""
    beside = {"resume", "fresh", "output_dir", "tracking", "output", "experiment", "sweep", "published", "port"}
    beside |= {"reuse_outdated", "models", "behavior"}
    values = cfg.model_dump(mode="json", exclude=beside)
    for data in (values["data"], *(values["data"]["parts"] or {}).values()):
        del data["cache"]
    for key in ("heartbeat_seconds", "stall_seconds", "stall_ends"):
        del values["train"][key]
    if cfg.model.inference == "auto":  # runs of older versions did not have the key
        del values["model"]["inference"]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise RunError(f"{file} is damaged; delete the folder or restore the file") from None
    return values


def read(folder: str) -> tuple[Path, RunConfig, dict[str, Any]]:
    """Read a finished run, or an export of one.

    Returns:
        Its folder, its configuration, and the contents of ``run.json``.

    Raises:
        RunError: for a folder that is missing, not a run, unfinished, or damaged, or whose model ships code that the
            command does not allow.
    """
    path = locate(folder)
    record = path / (EXPORTED if (path / EXPORTED).is_file() else "run.json")
    if not record.is_file() or not (path / "config.yaml").is_file():
        siblings = [file.parent.name for file in path.parent.glob(f"*/{record.name}")]
        raise RunError(f"run: {path} is not a run folder. {suggest(path.name, siblings, show=5)}".rstrip())
    facts = _read_json(record)
    if facts.get("status") != "complete":
        user = locks.holder(path / locks.LOCK)
        if user is not None:
            raise RunError(f"run: {path} is not complete: it is being written by {user}")
        raise RunError(
            f"run: {path} is {facts.get('status')}, not complete ({facts.get('error') or 'its process was killed'}). "
            "Repeat its command with resume=true"
        )
    job = current_job()
    cfg = migration.read(path / "config.yaml", job.folders if job else ())
    if cfg.model.trust_remote_code and not safety.consents(job.overrides if job else ()):
        raise RunError(
            f"run: {path} has {safety.REMOTE_CODE}=true, so its model ships Python code that would be run. "
            f"If you trust whoever made the folder, add {safety.REMOTE_CODE}=true to the command"
        )
    return path, cfg, facts
