"""A run is repeated from its record: bit-for-bit equal, or the first difference is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finsa.config import RunConfig
from finsa.errors import ConfigError, RunError
from finsa.evaluation import reproduction
from finsa.runs.run_folder import Result
from finsa.stages import rerun, train

Config = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def small_run(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with dropout, on sixty rows."""
    base = tmp_path_factory.mktemp("rerun")
    labels = ("利空", "中性", "利好")
    lines = [f"{row},第{row}条公告{labels[row % 3]}{row * 7},{labels[row % 3]}" for row in range(60)]
    (base / "rows.csv").write_text("\n".join(["id,text,label", *lines]) + "\n", encoding="utf-8")
    words = ["data=table", f"data.files={base / 'rows.csv'}", "data.cache=null", "train=smoke", "train.max_steps=6"]
    words += ["train.epochs=2"]
    words += ["method.adapter.dropout=0.2", "stage.compare_base=false", "tracking=none", f"output_dir={base}"]
    made = train.run(config(*words)).run_dir
    assert made is not None
    return made


@pytest.fixture
def first(small_run: Path, tmp_path: Path) -> Path:
    """A copy of a trained run."""
    return shutil.copytree(small_run, tmp_path / "first", ignore=shutil.ignore_patterns("checkpoints"))


def test_a_trained_run_is_reproduced(
    first: Path, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("stage=rerun", f"run={first}", f"output_dir={tmp_path}/again", "tracking=none")
    again = rerun.run(config(*words)).run_dir
    assert again is not None
    assert "all results are bit-identical" in capsys.readouterr().out
    checks = reproduction.compare(first, again)
    assert [(check.what, check.same) for check in checks] == [
        (what, True) for what in ("data", "prompt", "losses", "metrics", "predictions", "weights")
    ]
    assert checks[2].details == "9 records"  # 6 steps, 2 validations, the end
    assert reproduction.environment_changes(first, again) == []
    _shuffle(again / "adapters" / "default" / "adapter_config.json")
    assert reproduction.compare(first, again)[-1].same
    _spoil_and_compare(first, again)


def _shuffle(file: Path) -> None:
    """Write a set of names in another order, as another process may."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    names = settings["target_modules"][::-1]
    assert len(names) > 1
    file.write_text(json.dumps({**settings, "target_modules": names}), encoding="utf-8")


def _spoil_and_compare(first: Path, again: Path) -> None:
    """Change one thing after another, in reverse order; each becomes the first difference."""
    file = again / "adapters" / "default" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[1]
    save_file({**tensors, name: tensors[name] + np.float32(0.5)}, file, metadata={"format": "pt"})
    assert _first(first, again) == ("weights", f"adapters/default/{file.name}, {name} differs by up to 0.5")

    lines = (again / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    changed = {**json.loads(lines[3]), "label": "x"}
    lines[3] = json.dumps(changed, ensure_ascii=False)
    (again / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    what, details = _first(first, again)
    assert what == "predictions"
    assert details.startswith(f"record {changed['id']}, label: ")
    assert details.endswith(", now x")

    log = (again / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log[2] = json.dumps({**json.loads(log[2]), "loss": 9.5})
    (again / "log.jsonl").write_text("\n".join(log) + "\n", encoding="utf-8")
    what, details = _first(first, again)
    assert what == "losses"
    assert details.startswith("record 3, loss: ")
    assert details.endswith(", now 9.5")

    facts = json.loads((again / "run.json").read_text(encoding="utf-8"))
    facts["versions"]["torch"] = "0.1"
    (again / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    (line,) = reproduction.environment_changes(first, again)
    assert line.startswith("torch: ")
    assert line.endswith(", now 0.1")


def _first(first: Path, second: Path) -> tuple[str, str]:
    return next((check.what, check.details) for check in reproduction.compare(first, second) if not check.same)


def test_a_difference_is_an_error(
    first: Path, small_run: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repetition is the run itself; `test_a_trained_run_is_reproduced` really repeats it."""
    monkeypatch.setattr(rerun.nested, "run", lambda cfg, session: Result("train", small_run, {}))
    metrics = json.loads((first / "metrics.json").read_text(encoding="utf-8"))
    metrics["test"]["macro_f1"] = 0.99
    (first / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    words = ("stage=rerun", f"run={first}", f"output_dir={tmp_path}/again", "tracking=none")
    with pytest.raises(RunError, match=r"first difference is in metrics: test.macro_f1: 0.99, now 0\.\d+"):
        rerun.run(config(*words))


def test_changed_rows_are_reported_before_training(first: Path, config: Config, tmp_path: Path) -> None:
    facts = json.loads((first / "run.json").read_text(encoding="utf-8"))
    (first / "run.json").write_text(json.dumps({**facts, "data_fingerprint": "f00d"}), encoding="utf-8")
    with pytest.raises(RunError, match="the rows have changed since .*fingerprint f00d, now "):
        rerun.run(config("stage=rerun", f"run={first}", f"output_dir={tmp_path}/again"))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("made", "now", "start"), [(2, 1, "torchrun --nproc-per-node 2"), (1, 2, "python")])
def test_another_number_of_processes_is_refused(
    made: int, now: int, start: str, first: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = json.loads((first / "run.json").read_text(encoding="utf-8"))
    assert facts["processes"] == 1
    (first / "run.json").write_text(json.dumps({**facts, "processes": made}), encoding="utf-8")
    monkeypatch.setenv("WORLD_SIZE", str(now))
    message = rf"^run: {first} was run with {made} process(es)?, not {now}: {start} run\.py stage=rerun run={first}$"
    with pytest.raises(ConfigError, match=message):
        rerun.run(config("stage=rerun", f"run={first}", f"output_dir={tmp_path}/again"))
    assert not (tmp_path / "again").exists()


def test_environments_are_compared_by_the_recorded_entries(tmp_path: Path) -> None:
    facts: list[dict[str, object]] = [{"python": "3"}, {"python": "3", "processes": 1}, {"python": "3", "processes": 2}]
    for number, known in enumerate(facts):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "run.json").write_text(json.dumps(known), encoding="utf-8")
    old, one, two = (tmp_path / str(number) for number in range(3))
    assert reproduction.environment_changes(old, one) == []
    assert reproduction.environment_changes(one, two) == ["processes: 1, now 2"]


def test_a_search_is_not_run_again(config: Config, tmp_path: Path) -> None:
    from folders import write_run

    cfg = config("stage=search", f"output_dir={tmp_path}")
    place = write_run(tmp_path / "search", cfg, np.zeros(3, int), np.zeros(3, int))
    with pytest.raises(ConfigError, match="is a run of stage=search; only train, evaluate, moe_joint can be repeated"):
        rerun.run(config("stage=rerun", f"run={place}"))
