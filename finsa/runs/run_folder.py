"""Run folders: the record of a run, complete or marked failed, never half a file.

A folder holds ``config.yaml`` (resolved), ``run.json`` (status, provenance), ``ledger.json``, ``log.jsonl``,
``metrics.json``, ``predictions.jsonl``, ``adapters/<domain>/``, ``checkpoints/`` and figures.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from finsa.config import MoeJointStage, RunConfig, locate, migration, safety
from finsa.errors import Pruned, RunError, Stopped, suggest
from finsa.runs import locks, processes, provenance
from finsa.runs.open_folder import RunFolder as RunFolder
from finsa.session import Session, current_job

JOB = "job.json"  # what a sweep notes about each of its jobs
NAMED = ("latest", "default")  # runs that stage=serve finds itself

EXPORTED = "exported_run.json"  # an export's copy of run.json: under that name it would be counted as another run


@dataclass(frozen=True)
class Result:
    """What a stage returns.

    Args:
        stage: its name.
        run_dir: the run folder; None for a stage that writes none.
        metrics: numbers by name, the ones that ``metrics.json`` holds.
        objective: what a sweeper may maximise; a validation score, never a test score.
    """

    stage: str
    run_dir: Path | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    objective: float | None = None


@contextmanager
def start(cfg: RunConfig, data_fingerprint: str | None, session: Session) -> Iterator[RunFolder]:
    """Open a run's folder; on leaving it is complete, or marked failed with the error.

    With ``resume=true`` it is the newest unfinished folder of this very configuration.

    Args:
        cfg: the configuration.
        data_fingerprint: of the rows; a run is not resumed on others than it was started with. None: of no rows.
        session: says where the folder belongs.

    Raises:
        RunError: where there is nothing to resume, or the data have changed since.
    """
    if not processes.first():
        yield RunFolder(Path(processes.agreed(None)), {})
        return
    path = to_resume(cfg, data_fingerprint, session) if cfg.resume else _new_path(cfg, session)
    path.mkdir(parents=True, exist_ok=True)
    with locks.held(path / locks.LOCK, f"run folder {path}"):
        folder = _opened(cfg, path, data_fingerprint)
        processes.agreed(str(path))
        started = time.monotonic()
        try:
            yield folder
        except BaseException as error:
            status = "pruned" if isinstance(error, Pruned) else "stopped" if isinstance(error, Stopped) else "failed"
            with suppress(OSError):  # a full disk: the error itself is what has to be told
                folder.note(status=status, error=safety.masked(f"{type(error).__name__}: {error}")[:2000])
            raise
        if any("unknown" in files.values() for files in folder.facts["base_weights"].values()):
            folder.note(base_weights=starting_weights(cfg))  # a branch of the hub, which is on this machine now
        folder.note(
            status="complete",
            error=None,
            weights=provenance.weights(path),
            wall_seconds=round(time.monotonic() - started, 2),
            peak_memory_bytes=provenance.peak_memory(),
            finished=datetime.now().astimezone().isoformat(timespec="milliseconds"),
        )


def _opened(cfg: RunConfig, path: Path, data_fingerprint: str | None) -> RunFolder:
    """Write down what begins; wall seconds are those of this sitting, of which there may be several."""
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
        print(f"{path} is resumed, although it was started otherwise: {'; '.join(changes)}", flush=True)
    facts = {
        **known,
        **provenance.of(cfg),
        "base_weights": base,
        "resumed_with": changes,
        "config_hash": config_hash(cfg),
        "data_fingerprint": data_fingerprint,
        "status": "running",
        "sittings": known.get("sittings", 0) + 1,
    }
    folder = RunFolder(path, facts)
    written = yaml.safe_dump(cfg.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
    folder.write_text("config.yaml", f"# finsa {facts['versions']['finsa']}\n{written}")
    folder.note()
    return folder


def _new_path(cfg: RunConfig, session: Session) -> Path:
    if session.parent is not None:
        return session.parent.path
    if session.job is not None and session.job.sweep_dir is not None and not session.own_folders:
        return session.job.output_dir
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    name = "_".join([stamp, cfg.stage.name, cfg.method.name, cfg.model.name, cfg.data.title])
    base = Path(cfg.output_dir).absolute() / name
    path, number = base, 1
    while True:
        try:
            path.mkdir(parents=True)
        except FileExistsError:  # another process may have come between a look and the making
            number += 1
            path = base.with_name(f"{base.name}_{number}")
        else:
            return path


def starting_weights(cfg: RunConfig) -> dict[str, dict[str, str]]:
    """Fingerprints of all weights that a run starts from: base, saved adapter, a run it evaluates, runs as experts."""
    if cfg.run in NAMED:
        return {}
    if cfg.run is not None:
        path, known, facts = read(cfg.run)
        return {**provenance.base_weights(known), "run": facts.get("weights") or provenance.model_files(path)}
    named = cfg.stage.experts or {} if isinstance(cfg.stage, MoeJointStage) else {}
    experts = {f"expert {name}": read(place)[2].get("weights") or {} for name, place in named.items() if place}
    return {**provenance.base_weights(cfg), **provenance.adapter_weights(cfg), **experts}


def other_weights(facts: dict[str, Any], now: dict[str, dict[str, str]]) -> list[str]:
    """Which weights a run started from are other ones now; a run of an older version did not note them."""
    noted: dict[str, dict[str, str]] = facts.get("base_weights") or now
    found = []
    for what in noted | now:
        before, after = noted.get(what, {}), now.get(what, {})
        for name in sorted(before | after):
            came = before.get(name) == "unknown" and facts.get("status") != "complete"  # the run itself downloaded it
            if before.get(name) != after.get(name) and not came:
                found.append(f"{name} of the {what}: {before.get(name)}, now {after.get(name)}")
    return found


def unfinished(cfg: RunConfig, data_fingerprint: str | None = None) -> Path | None:
    """The newest unfinished run of this very configuration below ``output_dir``; None where there is none.

    Args:
        data_fingerprint: skips runs of other rows, those started with other weights, code or libraries, and those that
            another process is at; None: takes them.
    """

    def fits(path: Path, facts: dict[str, Any]) -> bool:
        if facts.get("status") == "complete" or facts.get("config_hash") != wanted:
            return False
        if data_fingerprint is None:
            return True
        return facts.get("data_fingerprint") == data_fingerprint and not locks.holder(path / locks.LOCK)

    wanted = config_hash(cfg)
    found = _newest(cfg.output_dir, "started", fits, pass_over=False)
    if data_fingerprint is None:
        return found[0][0] if found else None
    return _usable(cfg, found, "resumed")


def _usable(cfg: RunConfig, found: list[tuple[Path, dict[str, Any]]], use: str) -> Path | None:
    """The first of some runs of one configuration and rows that would come out the same now.

    Args:
        found: folders and facts, the newest first.
        use: what would be done with it, for the message: ``reused``, ``resumed``.
    """
    now = starting_weights(cfg) if found else {}
    refused = []
    for path, facts in found:
        weights, changes = other_weights(facts, now), provenance.changes(facts)
        told = "; ".join([*weights, *changes])
        if weights or (changes and not cfg.reuse_outdated):
            remedy = "" if weights else f"; reuse_outdated=true says that it may be {use} all the same"
            refused.append(f"{path} is not {use}, because it was made otherwise: {told}{remedy}")
            continue
        if changes:
            print(f"{path} is {use}, as reuse_outdated=true says, although it was made otherwise: {told}", flush=True)
        return path
    if refused:
        print(refused[0], flush=True)
    return None


def to_resume(cfg: RunConfig, data_fingerprint: str | None, session: Session) -> Path:
    """The run that ``resume=true`` goes on with.

    Raises:
        RunError: where there is none.
    """
    found = unfinished(cfg, data_fingerprint if session.group else None)
    if found is not None:
        return found
    others = sum(facts.get("status") != "complete" for _, facts in _records(cfg.output_dir, pass_over=False))
    raise RunError(
        f"resume: no unfinished run of this configuration below {cfg.output_dir} ({others} of other configurations). "
        "Run the same command without resume=true to start one"
    )


def finished(cfg: RunConfig, data_fingerprint: str | None) -> Path | None:
    """The newest complete run of this very configuration and these rows below ``output_dir``; None where there is none.

    It has to be made with the same weights, code and libraries, but for ``reuse_outdated``; what else is there is said.
    A folder that cannot be read is skipped: what it held is made again.
    """
    wanted = {"config_hash": config_hash(cfg), "data_fingerprint": data_fingerprint, "status": "complete"}
    found = _newest(cfg.output_dir, "finished", lambda _, facts: wanted.items() <= facts.items())
    return _usable(cfg, found, "reused")


def latest(output_dir: str) -> Path:
    """The newest complete training run below a folder.

    Raises:
        RunError: where there is none.
    """

    def trained(_: Path, facts: dict[str, Any]) -> bool:
        return facts.get("stage") in ("train", "moe_joint") and facts.get("status") == "complete"

    found = _newest(output_dir, "finished", trained)
    if not found:
        raise RunError(f"run=latest: no finished training run below {output_dir}. Train one: python run.py")
    return found[0][0]


def _newest(
    output_dir: str, moment: str, fits: Callable[[Path, dict[str, Any]], bool], pass_over: bool = True
) -> list[tuple[Path, dict[str, Any]]]:
    """The runs that fit with their facts, by their moment, ``started`` or ``finished``, the latest first."""
    found = [(path, facts) for path, facts in _records(output_dir, pass_over) if fits(path, facts)]
    return sorted(found, key=lambda run: (_instant(run[1].get(moment)), run[0]), reverse=True)


def _instant(written: Any) -> float:
    """Seconds since 1970 of a time in a record, whatever its offset: local times go back by an hour once a year."""
    try:
        return datetime.fromisoformat(str(written)).timestamp()
    except ValueError:
        return -math.inf


def _records(output_dir: str, pass_over: bool) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Run folders below a folder with their facts; what cannot be read is passed over, or an error."""
    for file in Path(output_dir).absolute().rglob("run.json"):
        try:
            facts = _read_json(file)
        except RunError:
            if pass_over:
                continue
            raise
        yield file.parent, facts


def config_hash(cfg: RunConfig) -> str:
    """Hash of what decides a run's result: the configuration but for how it is kept, shown and watched."""
    beside = {"resume", "fresh", "output_dir", "tracking", "output", "experiment", "sweep", "published", "port"}
    beside |= {"reuse_outdated", "models"}
    values = cfg.model_dump(mode="json", exclude=beside)
    for data in (values["data"], *(values["data"]["parts"] or {}).values()):
        del data["cache"]
    for key in ("heartbeat_seconds", "stall_seconds", "stall_ends"):
        del values["train"][key]
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
        Its folder, its configuration and the facts of ``run.json``.

    Raises:
        RunError: for a folder that is missing, no run, unfinished or damaged, or whose model ships code that the
            command does not allow.
    """
    path = locate(folder)
    record = path / (EXPORTED if (path / EXPORTED).is_file() else "run.json")
    if not record.is_file() or not (path / "config.yaml").is_file():
        siblings = [file.parent.name for file in path.parent.glob("*/config.yaml")]
        raise RunError(f"run: {path} is no run folder. {suggest(path.name, siblings, show=5)}".rstrip())
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
            f"run: {path} says {safety.REMOTE_CODE}=true, so its model ships Python code that would be run. "
            f"If you trust whoever made the folder, add {safety.REMOTE_CODE}=true to the command"
        )
    return path, cfg, facts
