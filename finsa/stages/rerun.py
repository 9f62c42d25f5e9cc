"""Run a finished run again from its own record, and say whether everything comes out as it was."""

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

AGAIN = ("train", "evaluate", "moe_joint")  # stages whose whole result lies in their folder


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Run ``run``'s configuration in a folder of its own, and compare the two folders.

    Raises:
        ConfigError: for a run of a stage that is not run again, or of another number of processes.
        RunError: where a result is another one, naming the first difference.
    """
    session = session or Session()
    path, known, facts = run_folder.read(str(cfg.run))
    if known.stage.name not in AGAIN:
        text = f"{path} is of stage={known.stage.name}; {', '.join(AGAIN)} can be run again"
        raise ConfigError([Problem("run", text)])
    processes.require_world_size(path, facts.get("processes"))
    processes.require(known)
    rows = None if known.run is not None else dataset.load(known.data, session).fingerprint
    if rows is not None and rows != facts.get("data_fingerprint"):
        raise RunError(
            f"rerun: the rows are others than {path} was made with (fingerprint {facts.get('data_fingerprint')}, now "
            f"{rows}), so that nothing else could come out the same"
        )
    if other := run_folder.other_weights(facts, run_folder.starting_weights(known)):
        raise RunError(
            f"rerun: weights have changed since {path} was made ({other[0]}), so that nothing else could come out the "
            "same"
        )
    changed = {"output_dir": cfg.output_dir, "tracking": cfg.tracking, "resume": False, "output": None}
    result = nested.run(known.model_copy(update=changed), session)
    assert result.run_dir is not None
    if processes.is_main():
        _compare(path, result.run_dir)
    return Result("rerun", result.run_dir, result.metrics)


def _compare(path: Path, again: Path) -> None:
    """Tell what is the same in two folders.

    Raises:
        RunError: where something is not, naming the first difference.
    """
    checks = reproduction.compare(path, again)
    others = reproduction.environment_changes(path, again)
    shown = Table("compared", "result", "", title=f"{path.name}, run again", title_justify="left")
    for check in checks:
        shown.add_row(check.what, "same" if check.same else "other", check.details)
    tables.show(shown)
    print(
        "made with other versions, code or hardware:" if others else "made with the same versions on the same machine"
    )
    for line in others:
        print(f"  {line}")
    wrong = [check for check in checks if not check.same]
    if wrong:
        cause = " Versions, code or hardware differ, see above" if others else ""
        raise RunError(f"rerun: the first difference is in {wrong[0].what}: {wrong[0].details}.{cause}")
    print(f"everything is the same to the last bit: {again}")
