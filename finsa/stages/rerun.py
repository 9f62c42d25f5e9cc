"""Repeat a finished run from its configuration, and compare every result with the original."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from finsa.config import RunConfig
from finsa.data import dataset
from finsa.errors import ConfigError, Problem, RunError
from finsa.evaluation import reproduction, tables
from finsa.runs import nested, processes, run_folder
from finsa.runs.run_folder import Result
from finsa.session import Session

REPEATABLE = ("train", "evaluate", "moe_joint")  # stages whose complete result is in the run folder


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Repeat ``run`` in a new run folder, and compare both folders.

    Raises:
        ConfigError: for a stage that cannot be repeated, or a different number of processes.
        RunError: if results differ, with the first difference.
    """
    session = session or Session()
    path, known, facts = run_folder.read(str(cfg.run))
    if known.stage.name not in REPEATABLE:
        text = f"{path} is a run of stage={known.stage.name}; only {', '.join(REPEATABLE)} can be repeated"
        raise ConfigError([Problem("run", text)])
    processes.require_world_size(path, facts.get("processes"))
    processes.require(known)
    rows = None if known.run is not None else dataset.load(known.data, session).fingerprint
    if rows is not None and rows != facts.get("data_fingerprint"):
        raise RunError(
            f"rerun: the rows have changed since {path} was run (fingerprint {facts.get('data_fingerprint')}, now "
            f"{rows}), so results would differ"
        )
    if other := run_folder.other_weights(facts, run_folder.starting_weights(known)):
        raise RunError(f"rerun: weights have changed since {path} was run ({other[0]}), so results would differ")
    uncached = known.data.model_copy(update={"cache": None})  # the base model's scores are computed, not read
    changed = {
        "output_dir": cfg.output_dir,
        "tracking": cfg.tracking,
        "resume": False,
        "output": None,
        "data": uncached,
    }
    result = nested.run(known.model_copy(update=changed), session)
    assert result.run_dir is not None
    if processes.is_main():
        _compare(path, result.run_dir)
    return Result("rerun", result.run_dir, result.metrics)


def _compare(path: Path, again: Path) -> None:
    """Print a comparison of two run folders.

    Raises:
        RunError: if they differ, with the first difference.
    """
    checks = reproduction.compare(path, again)
    changes = reproduction.environment_changes(path, again)
    table = Table("compared", "result", "", title=f"{path.name}, repeated", title_justify="left")
    for check in checks:
        table.add_row(check.what, "same" if check.same else "different", check.details)
    tables.show(table)
    print("run with different versions, code or hardware:" if changes else "run with the same versions and hardware")
    for line in changes:
        print(f"  {line}")
    if different := [check for check in checks if not check.same]:
        cause = " Versions, code or hardware differ, see above" if changes else ""
        raise RunError(f"rerun: the first difference is in {different[0].what}: {different[0].details}.{cause}")
    print(f"all results are bit-identical: {again}")
