"""Which finished run `method.init` names, and what it has to have in common with the new one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from trained import SHORT

from finsa.config import RunConfig
from finsa.data import dataset
from finsa.errors import ConfigError, RunError
from finsa.models import folders
from finsa.runs import starts
from finsa.session import Job, Session

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def run(trained: Callable[..., Path]) -> Path:
    return trained("lora_response")


def copy(run: Path, to: Path, seed: int = 42, macro_f1: float = 0.5, **changed: str) -> Path:
    """A finished run like another one, with another seed and validation score."""
    shutil.copytree(run, to)
    text = (to / "config.yaml").read_text(encoding="utf-8").replace("\nseed: 42\n", f"\nseed: {seed}\n")
    for old, new in changed.items():
        text = text.replace(old, new)
    (to / "config.yaml").write_text(text, encoding="utf-8")
    metrics = json.loads((to / "metrics.json").read_text(encoding="utf-8"))
    metrics["validation"]["macro_f1"] = macro_f1
    (to / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return to


def job_in(sweep: Path) -> Session:
    return Session(Job((), {}, (), sweep / "9", sweep, 9))


def test_a_run_lends_its_adapter(config: Configure, run: Path) -> None:
    cfg = config("method=dpo", "method.adapter.rank=2", "method.adapter.dropout=0.3", *SHORT, f"method.init={run}")
    method = starts.resolved(cfg, None).method
    assert method.adapter is not None
    assert (method.init, method.adapter.init) == (str(run), str(run / "adapters" / "default"))
    assert (method.adapter.rank, method.adapter.alpha, method.adapter.dropout) == (8, 16, 0.3)
    again = starts.resolved(cfg.model_copy(update={"method": method}), None)
    assert again.method == method


def test_of_a_folder_of_runs_the_best_of_the_seed_is_taken(config: Configure, run: Path, tmp_path: Path) -> None:
    copy(run, tmp_path / "runs" / "a", 1, 0.8)
    best = copy(run, tmp_path / "runs" / "b", 2, 0.6)
    copy(run, tmp_path / "runs" / "c", 2, 0.5)
    unfinished = copy(run, tmp_path / "runs" / "d", 2, 0.9)
    facts = json.loads((unfinished / "run.json").read_text(encoding="utf-8"))
    (unfinished / "run.json").write_text(json.dumps(facts | {"status": "failed"}), encoding="utf-8")
    cfg = config("method=dpo", "seed=2", *SHORT, f"method.init={tmp_path / 'runs'}")
    assert starts.resolved(cfg, None).method.init == str(best)
    with pytest.raises(ConfigError, match="no finished run below .* with seed=3"):
        starts.resolved(cfg.model_copy(update={"seed": 3}), None)


def test_of_a_folder_a_run_that_fits_is_taken(config: Configure, run: Path, tmp_path: Path) -> None:
    """Not one with the better score that would be refused, or that has other rows."""
    for name, old, new in (
        ("chat", "\n  prompt: plain\n", "\n  prompt: chat\n"),
        ("int8", "quantization: none", "quantization: int8"),
        ("rows", "    seed: 42\n", "    seed: 7\n"),
    ):
        assert old in (run / "config.yaml").read_text(encoding="utf-8")
        copy(run, tmp_path / name, macro_f1=0.9, **{old: new})
    fits = copy(run, tmp_path / "fits", macro_f1=0.1)
    cfg = config("method=dpo", *SHORT, f"method.init={tmp_path}")
    assert starts.resolved(cfg, None).method.init == str(fits)


def test_a_shape_that_the_command_names_must_be_that_of_the_run(config: Configure, run: Path) -> None:
    for given, message in (("rank=3", "has rank=8; leave out"), ("targets=all", "has targets=query_value; leave out")):
        word = f"method.adapter.{given}"
        cfg = config("method=dpo", word, *SHORT, f"method.init={run}")
        session = Session(Job((word,), {}, (), run, None, 0))
        with pytest.raises(ConfigError, match=f"{message} method.adapter.{given.partition('=')[0]}"):
            starts.resolved(cfg, session)
    assert starts.resolved(config("method=dpo", "method.adapter.rank=8", *SHORT, f"method.init={run}"), session)


@pytest.mark.parametrize("stage", ["train", "check"])
def test_a_start_of_a_sweep_or_a_chain_is_refused_elsewhere(stage: str, config: Configure) -> None:
    for init, message in (("sweep", "sweep is for the jobs of a sweep"), ("@sft", "@sft is a link of stage=chain")):
        with pytest.raises(ConfigError, match=message):
            starts.resolved(config(f"stage={stage}", "method=dpo", SHORT[0], f"method.init={init}"), Session())


def test_in_a_sweep_the_best_earlier_job_is_taken(config: Configure, run: Path, tmp_path: Path) -> None:
    """A job may have reused a run of another folder, which its record names."""
    reused = copy(run, tmp_path / "before" / "a", macro_f1=0.7)
    copy(run, tmp_path / "sweep" / "0", macro_f1=0.6)
    (tmp_path / "sweep" / "1").mkdir()
    record = json.dumps({"status": "complete", "run": str(reused)})
    (tmp_path / "sweep" / "1" / "job.json").write_text(record, encoding="utf-8")
    cfg = config("method=dpo", *SHORT, "method.init=sweep")
    assert starts.resolved(cfg, job_in(tmp_path / "sweep")).method.init == str(reused)
    with pytest.raises(ConfigError, match="sweep is for the jobs of a sweep"):
        starts.resolved(cfg, Session())
    assert list(starts.problems(cfg)) == []  # before the sweep has started


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("method.quantization=int8",), "was trained with quantization=none; add method.quantization=none"),
        (("model.prompt=chat",), "here model.prompt is chat, not plain"),
        (("model=smollm2_135m", "model.weights=random"), "here model.weights is random, not pretrained"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(
    words: tuple[str, ...], message: str, config: Configure, run: Path, tmp_path: Path
) -> None:
    cfg = config("method=dpo", *SHORT, f"method.init={run}", *words)
    with pytest.raises(ConfigError, match=message):
        starts.resolved(cfg, None)
    assert any(message in problem.text for problem in folders.problems(cfg))


def test_a_run_without_an_adapter_is_refused(config: Configure, trained: Callable[..., Path], run: Path) -> None:
    cfg = config("method=dpo", *SHORT, f"method.init={trained('tfidf_lr')}")
    with pytest.raises(ConfigError, match="has no single adapter .*; start from a run that trained one"):
        starts.resolved(cfg, None)
    missing = config("method=dpo", *SHORT, f"method.init={run.parent / 'nowhere'}")
    assert [problem.path for problem in folders.problems(missing)] == ["method.init"]
    with pytest.raises(RunError, match="is not a run folder"):
        starts.resolved(missing, None)


def test_weights_are_compared_by_content(config: Configure, run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(Path(folders.locate("data/tiny")), moved)
    cfg = config("method=dpo", *SHORT, f"method.init={run}", f"model.path={moved}")
    assert starts.resolved(cfg, None).method.init == str(run)
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(ConfigError, match="the weights differ: model.safetensors"):
        starts.resolved(cfg, None)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("key", ["method.init", "method.adapter.init"])
def test_test_rows_that_an_earlier_run_was_trained_on_are_refused(
    key: str, steps: int, config: Configure, run: Path, tmp_path: Path
) -> None:
    """At any number of steps back, whichever key names the start."""
    words = ("method=dpo", f"{key}={run}") if key == "method.init" else ("method=lora_response", f"{key}={run}")
    data = dataset.load(config(*SHORT).data)
    leaked = replace(data, splits={**data.splits, "test": data.splits["train"].head(10)}, fingerprint="other")
    if steps == 2:  # the run that is named has seen none of these rows, but it started from one that has
        facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
        second = copy(run, tmp_path / "second", **{"    init: null": f"    init: {run}"})
        (second / "run.json").write_text(json.dumps({**facts, "data_fingerprint": "other"}), encoding="utf-8")
        words = tuple(word.replace(str(run), str(second)) for word in words)
    cfg = starts.resolved(config(*words, *SHORT), None)
    assert len(list(starts.origins(cfg))) == steps
    with pytest.raises(ConfigError, match=f"10 of the 10 test texts are training or validation rows of {run}"):
        starts.require_unseen_test_rows(cfg, leaked, dataset.load)
    starts.require_unseen_test_rows(cfg, replace(data, fingerprint="other"), dataset.load)  # none of them known


def test_other_labels_and_prompts_are_refused(config: Configure, run: Path) -> None:
    cfg = starts.resolved(config("method=dpo", *SHORT, f"method.init={run}"), None)
    for key, value, message in (
        ("labels", {"利空": "跌", "中性": "平", "利好": "涨"}, "was trained on the labels"),
        ("prompt", "{text}：", "was trained with data.prompt="),
    ):
        other = cfg.model_copy(update={"data": cfg.data.model_copy(update={key: value})})
        with pytest.raises(ConfigError, match=message):
            starts.require_same_labels(other, dataset.load(other.data))
