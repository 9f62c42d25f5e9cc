"""The joint stage on a small part of the sample: folder, metrics, restoring, and refused configurations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from finsa.config import ROOT, RunConfig, command_line
from finsa.errors import ConfigError, DataError, ModelError, RunError
from finsa.evaluation import metrics, moe, run_results
from finsa.inference import predictor
from finsa.runs import run_folder
from finsa.runs.run_folder import Result
from finsa.stages import evaluate, moe_joint, report
from finsa.training import expert_runs, joint_training

Compose = Callable[..., RunConfig]
SHORT = (
    *("train=smoke", "train.max_steps=4", "train.batch_size=8", "train.validate_every=2", "train.warmup=0"),
    *("tracking=none", "data.cache=null", "model.dtype=float32"),
)
JOINT = ("stage=moe_joint", "stage.warmup_steps=3")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the sample, with as many rows of both domains in every split."""
    folder = tmp_path_factory.mktemp("rows")
    for name, rows in (("train", 40), ("valid", 16), ("test", 24)):
        sample = pl.read_csv(ROOT / "data" / "sample" / f"{name}.csv")
        sample.group_by("domain", maintain_order=True).head(rows).write_csv(folder / f"{name}.csv")
    return folder


@pytest.fixture(scope="module")
def short(shallow: tuple[str, ...]) -> tuple[str, ...]:
    """Overrides of a short joint training of two layers."""
    return (*SHORT, *JOINT, *shallow)


@pytest.fixture(scope="module")
def finished(
    config: Compose, files: Path, short: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, Result]:
    place = tmp_path_factory.mktemp("runs")
    cfg = config(*short, f"data.files={files}", f"output_dir={place}")
    return cfg, moe_joint.run(cfg)


def folder(result: Result) -> Path:
    assert result.run_dir is not None
    return result.run_dir


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def stages(place: Path) -> list[str]:
    return sorted(read(file)["stage"] for file in place.rglob("run.json"))


def test_the_metrics_are_those_of_the_predictions(finished: tuple[RunConfig, Result]) -> None:
    _, result = finished
    kept, rows = read(folder(result) / "metrics.json"), lines(folder(result) / "predictions.jsonl")
    names = list(kept["test"]["per_class"])
    gold, label = ([names.index(row[key]) for row in rows] for key in ("gold", "label"))
    assert metrics.report(gold, label, names) == kept["test"]
    gates = np.array([list(row["gates"].values()) for row in rows])
    assert {tuple(row["gates"]) for row in rows} == {("news", "forum")}
    np.testing.assert_allclose(gates.sum(1), 1, atol=1e-5)
    again = moe.analyze_gates(gates, [row["domain"] for row in rows], ["news", "forum"])
    assert again["confusion"] == kept["router"]["confusion"]
    assert again["accuracy"] == kept["router"]["accuracy"]
    right = [max(row["gates"], key=row["gates"].get) == row["domain"] for row in rows]
    assert kept["router"]["accuracy"] == pytest.approx(np.mean(right))
    assert result.objective == kept["validation"]["macro_f1"]
    assert "routing_accuracy" in kept["validation"]
    assert "Router of lora_response mixture" in (folder(result) / "index.html").read_text(encoding="utf-8")
    assert (folder(result) / "router.png").is_file()


def test_the_comparison_follows_from_the_stored_answers(finished: tuple[RunConfig, Result]) -> None:
    kept = {record["arm"]: record for record in finished[1].metrics["mixture"]}
    assert list(kept) == [
        "mixture",
        "mixture, hard routing",
        "news alone",
        "forum alone",
        "true domain's expert",
        "another domain's expert",
        "union",
    ]
    rows = lines(folder(finished[1]) / "comparison.jsonl")
    for row in rows:
        names = sorted(("news", "forum"), key=lambda name: name != row["domain"])
        own, other = (row["answers"][f"{name} alone"] for name in names)
        assert (row["answers"]["true domain's expert"], row["answers"]["another domain's expert"]) == (own, other)
    for arm, record in kept.items():
        assert record["accuracy"] == pytest.approx(np.mean([row["answers"][arm] == row["gold"] for row in rows]))
        news = [row["answers"][arm] == row["gold"] for row in rows if row["domain"] == "news"]
        assert len(news) < len(rows) == record["n"]
    fixed = sum(row["answers"]["mixture"] == row["gold"] != row["answers"]["union"] for row in rows)
    assert kept["union"]["fixed"] == fixed
    mixture = lines(folder(finished[1]) / "predictions.jsonl")
    assert [row["answers"]["mixture"] for row in rows] == [row["label"] for row in mixture]


def test_an_expert_alone_answers_as_the_run_that_trained_it(finished: tuple[RunConfig, Result]) -> None:
    """In the mixture, its answers to rows of its domain equal those of its run."""
    facts = read(folder(finished[1]) / "run.json")
    rows = {row["id"]: row["answers"] for row in lines(folder(finished[1]) / "comparison.jsonl")}
    for name, run in facts["experts"].items():
        own = lines(Path(run) / "predictions.jsonl")
        assert len(own) > 20
        assert [rows[row["id"]][f"{name} alone"] for row in own] == [row["label"] for row in own]
        assert read(Path(run) / "ledger.json")["buckets"][f"filtered: not of domain {name}"] > 0
        assert (Path(run) / "adapters" / name / "adapter_model.safetensors").is_file()


def test_the_checkpoints_show_which_parameters_each_phase_trains(finished: tuple[RunConfig, Result]) -> None:
    place = folder(finished[1]) / "checkpoints"
    found = {
        name: {
            file.relative_to(place / name).as_posix(): load_file(file)
            for file in (place / name).glob("*/**/*.safetensors")
        }
        for name in (joint_training.INIT, joint_training.WARMUP, joint_training.JOINT)
    }
    init, warm, end = found.values()
    for file, tensors in init.items():
        for key, tensor in tensors.items():
            moved = not torch.equal(tensor, warm[file][key]), not torch.equal(warm[file][key], end[file][key])
            assert moved == ((True, True) if "router" in file else (False, True)), (file, key)
    facts = read(folder(finished[1]) / "run.json")
    for name, run in facts["experts"].items():
        original = load_file(Path(run) / "adapters" / name / "adapter_model.safetensors")
        assert all(
            torch.equal(t, init[f"adapters/{name}/adapter_model.safetensors"][key]) for key, t in original.items()
        )
    assert (folder(finished[1]) / "adapters" / "news" / "adapter_config.json").is_file()
    steps = [row["step"] for row in lines(folder(finished[1]) / "log.jsonl") if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert facts["trainable_parameters"] == 2 * 14_336 + 64 * 256 + 64 + 2 * 64 + 2 * 64 + 2 + 1


def test_the_same_command_again_trains_no_expert_and_is_resumed_after_its_warm_up(
    finished: tuple[RunConfig, Result], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, result = finished
    place = Path(cfg.output_dir)
    assert stages(place) == ["moe_joint", "train", "train", "train"]
    real, calls = joint_training.validate, []

    def breaks(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:  # after the warm-up, and the first validation of the joint stage
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(joint_training, "validate", breaks)
        with pytest.raises(KeyboardInterrupt):
            moe_joint.run(cfg)
    assert "expert news: /" in capsys.readouterr().out
    resumed = moe_joint.run(cfg.model_copy(update={"resume": True}))
    assert stages(place) == ["moe_joint", "moe_joint", "train", "train", "train"]
    assert folder(resumed) != folder(result)
    assert resumed.metrics == result.metrics
    for name in ("predictions.jsonl", "comparison.jsonl"):
        assert (folder(resumed) / name).read_bytes() == (folder(result) / name).read_bytes()


def test_evaluate_gives_the_same(finished: tuple[RunConfig, Result], config: Compose, tmp_path: Path) -> None:
    run = folder(finished[1])
    again = evaluate.run(config("stage=evaluate", f"run={run}", "tracking=none", f"output_dir={tmp_path}"))
    assert again.metrics["test"] == finished[1].metrics["test"]
    first, second = (lines(path / "predictions.jsonl") for path in (run, folder(again)))
    for one, other in zip(first, second, strict=True):
        assert one["probs"] == pytest.approx(other["probs"], abs=2e-5)
        assert one["gates"] == pytest.approx(other["gates"], abs=2e-5)
    assert again.metrics["router"]["confusion"] == finished[1].metrics["router"]["confusion"]


def test_the_report_shows_the_mixture(finished: tuple[RunConfig, Result], config: Compose, tmp_path: Path) -> None:
    union = read(folder(finished[1]) / "run.json")["union"]
    named = f"runs=[{folder(finished[1])},{union}]"
    made = report.run(config("stage=report", named, f"output={tmp_path}", "tracking=none"))
    assert set(made.metrics) == {"lora_response mixture", "lora_response"}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("Mixture", "another domain&#39;s expert", "Router of lora_response mixture", "figures/router.png"):
        assert text in page, text
    said = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "lora_response mixture against one adapter trained on all domains: macro-F1 " in said
    assert (tmp_path / "figures" / "router.png").stat().st_size > 5000


def named(news: object, forum: object) -> str:
    return f"stage.experts={{news: {news}, forum: {forum}}}"


def restore_hard_routed(result: Result, config: Compose, place: Path) -> None:
    """Evaluate a mixture, of which one expert scores each row and which was not compared, from its folder."""
    again = evaluate.run(config("stage=evaluate", f"run={result.run_dir}", "tracking=none", f"output_dir={place}"))
    assert again.metrics["test"] == result.metrics["test"]
    gates = np.array([list(row["gates"].values()) for row in lines(folder(result) / "predictions.jsonl")])
    assert set(gates.ravel().tolist()) == {0, 1}
    assert "mixture" not in result.metrics


QUICK = ("train.max_steps=2", "stage.warmup_steps=1", "stage.compare=false")


def test_a_quantized_mixture_of_named_experts_whose_router_reads_a_layer_is_restored(
    finished: tuple[RunConfig, Result], config: Compose, files: Path, short: tuple[str, ...], tmp_path: Path
) -> None:
    facts = read(folder(finished[1]) / "run.json")
    kind = ("method=lora_adaptive_balanced", "method.quantization=nf4", "stage.router.read=layer")
    words = (*short, *QUICK, *kind, "stage.routing=top_k", named(**facts["experts"]))
    result = moe_joint.run(config(*words, f"data.files={files}", f"output_dir={tmp_path}"))
    assert stages(tmp_path) == ["moe_joint"]
    assert read(folder(result) / "run.json")["experts"] == facts["experts"]
    restore_hard_routed(result, config, tmp_path)


def test_resume_continues_expert_training_before_a_mixture_of_outputs_with_a_head_exists(
    config: Compose, files: Path, short: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = ("method=classifier", "stage.mix=output", "stage.routing=hard", "train.gradient_checkpointing=true")
    short = (*short, *QUICK, *kind, f"data.files={files}", f"output_dir={tmp_path}")
    with pytest.raises(RunError, match="no unfinished run of this configuration"):
        moe_joint.run(config(*short, "resume=true"))
    real = run_results.validation

    def breaks(*arguments: Any) -> Any:
        if len(stages(tmp_path)) == 2:  # in the second expert's training
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(run_results, "validation", breaks)
        with pytest.raises(KeyboardInterrupt):
            moe_joint.run(config(*short))
    begun = {path.parent for path in tmp_path.rglob("run.json")}
    assert stages(tmp_path) == ["train", "train"]
    result = moe_joint.run(config(*short, "resume=true"))
    assert stages(tmp_path) == ["moe_joint", "train", "train"]
    assert {path.parent for path in tmp_path.rglob("run.json")} > begun  # no expert was started anew
    with pytest.raises(RunError, match="no unfinished run of this configuration"):
        moe_joint.run(config(*short, "resume=true"))
    restore_hard_routed(result, config, tmp_path / "again")


# ------------------------------------------------------------------------------------------------ errors


def test_missing_experts_are_named_with_their_commands(config: Compose, files: Path, tmp_path: Path) -> None:
    cfg = config(*SHORT, *JOINT, "stage.missing=error", f"data.files={files}", f"output_dir={tmp_path}")
    with pytest.raises(
        ConfigError,
        match=r"no finished run has trained news, forum\. (.|\n)*python run\.py model=tiny (.|\n)*"
        r"data\.domain=forum",
    ):
        moe_joint.run(cfg)
    assert not list(tmp_path.rglob("run.json"))


def test_experts_that_do_not_fit_are_refused_before_weights(
    finished: tuple[RunConfig, Result],
    config: Compose,
    files: Path,
    short: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = read(folder(finished[1]) / "run.json")
    news, forum = facts["experts"]["news"], facts["experts"]["forum"]
    trained_on = re.escape(short[-2])  # model.path=...
    monkeypatch.setattr(joint_training.base, "load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    short = (*short, f"data.files={files}", f"output_dir={tmp_path}")
    for further, error, message in (
        ((named(files, forum),), RunError, "is not a run folder"),
        ((named(forum, news),), RunError, "expert news: .* was trained on domain forum; are experts swapped"),
        ((named(folder(finished[1]), forum),), RunError, "run of stage=moe_joint .* has no adapter"),
        ((named(news, forum), "model.think=closed", "model.prompt=chat"), RunError, r"\(model\.prompt=plain\)"),
        ((named(news, forum), "model.path=elsewhere", "model.tokenizer=data/tiny"), RunError, trained_on),
        ((named(news, forum), "data.max_length=100"), RunError, "different prompt or max_length"),
        ((named(news, forum), command_line.quote("data.labels=[利好,中性,利空]")), RunError, "different set of labels"),
        ((named(news, forum), "method=classifier"), ModelError, "expert news: there is no classification head"),
        (
            ("stage.experts={macro: null, micro: null}",),
            ConfigError,
            r"macro, micro are not the domains .*domain_weight=0",
        ),
        (("stage.experts={macro: null, micro: null}", "stage.domain_weight=0.0"), ConfigError, "has no run folder"),
    ):
        with pytest.raises(error, match=message):
            moe_joint.run(config(*short, *further))
    assert not list(tmp_path.rglob("run.json"))


def test_rows_of_one_domain_are_refused(config: Compose, files: Path, tmp_path: Path) -> None:
    short = (*SHORT, *JOINT, f"data.files={files}", f"output_dir={tmp_path}")
    with pytest.raises(DataError, match=r"the training rows have no domain, .*data\.columns\.domain=<column>"):
        moe_joint.run(config(*short, "data.columns.domain=null"))
    for name in ("train", "valid", "test"):
        pl.read_csv(files / f"{name}.csv").filter(pl.col("domain") == "news").write_csv(tmp_path / f"{name}.csv")
    with pytest.raises(DataError, match="are all of domain news, and a mixture needs two"):
        moe_joint.run(config(*short, f"data.files={tmp_path}"))


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (("method=dora",), "adapter.variant=dora has one magnitude"),
        (("method=zero_shot",), "method=zero_shot has none"),
        (("data.domain=news",), "uses all domains, and data.domain=news selects one"),
        (("stage.experts={news: somewhere}",), "needs at least two experts"),
    ],
)
def test_configurations_that_form_no_mixture(config: Compose, further: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config("stage=moe_joint", *further)


def test_rows_of_an_unknown_domain_are_reported(
    finished: tuple[RunConfig, Result], config: Compose, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = pl.read_csv(files / "test.csv").with_columns(pl.lit("weibo").alias("domain"))
    other.write_csv(tmp_path / "test.csv")
    cfg = config("stage=evaluate", f"run={folder(finished[1])}", "tracking=none", f"output_dir={tmp_path}/runs")
    rows = finished[0].data.model_copy(update={"files": str(tmp_path), "labels": ("利空", "中性", "利好")})
    other_rows = finished[0].model_copy(update={"data": rows})
    monkeypatch.setattr(predictor, "with_named_data", lambda *_: other_rows)
    monkeypatch.setattr(evaluate.predictor, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(DataError, match=r"domain 'weibo', .* trained on news, forum\. .*data\.columns\.domain=null"):
        evaluate.run(cfg)
    assert not (tmp_path / "runs").exists()


def test_the_expert_of_a_domain_is_never_trained_on_a_held_out_row(config: Compose, tmp_path: Path) -> None:
    """One file without splits: rows of a domain are in the same splits as in the whole data set."""
    rows = pl.concat(pl.read_csv(ROOT / "data" / "sample" / f"{name}.csv") for name in ("train", "test")).head(600)
    rows.write_csv(tmp_path / "all.csv")
    cfg = config(f"data.files={tmp_path}/all.csv", "data.cache=null", "stage=moe_joint", "data.split.rule=random")
    whole = expert_runs.dataset.load(cfg.data)
    for name in ("news", "forum"):
        part = expert_runs.dataset.load(expert_runs.expert_config(cfg, name).data)
        for split, frame in part.splits.items():
            assert frame["id"].to_list() == whole.splits[split].filter(pl.col("domain") == name)["id"].to_list()


def test_an_expert_is_the_ordinary_run_of_its_command(
    finished: tuple[RunConfig, Result], config: Compose, files: Path, shallow: tuple[str, ...]
) -> None:
    words = (*SHORT, *shallow, "data.domain=forum", f"data.files={files}")
    cfg = config(*words, f"output_dir={finished[0].output_dir}")
    expert = Path(read(folder(finished[1]) / "run.json")["experts"]["forum"])
    assert run_folder.finished(cfg, expert_runs.dataset.load(cfg.data).fingerprint) == expert
    assert (expert / "adapters" / "forum" / "adapter_config.json").is_file()


def test_a_mixture_answers_and_is_exported_like_any_other_run(
    config: Compose, finished: tuple[RunConfig, Result], tmp_path: Path
) -> None:
    """The answers of `predict`, `serve` and an export equal those recorded by the run, including the gates."""
    from finsa.stages import export

    known = lines(folder(finished[1]) / "predictions.jsonl")
    texts = [record["text"] for record in known]
    exported = tmp_path / "exported"
    export.run(
        config("stage=export", f"run={folder(finished[1])}", "format=adapter", f"output={exported}", "stage.timed=2")
    )
    assert read(exported / "receipt.json")["agreement"] == 1
    for place in (folder(finished[1]), exported):
        answerer = predictor.restore(str(place), 4096, merge=True)
        answers = answerer(texts)
        answerer.close()
        assert answers.experts == tuple(known[0]["gates"]) == ("news", "forum")
        assert answers.predicted == [record["label"] for record in known]
        assert answers.gates is not None
        gates = [[record["gates"][name] for name in answers.experts] for record in known]
        assert np.abs(answers.gates - np.array(gates)).max() < 1e-5
        assert answers.routes == [max(record["gates"], key=record["gates"].get) for record in known]
    with pytest.raises(ConfigError, match="format=adapter writes all experts with their router"):
        export.run(config("stage=export", f"run={folder(finished[1])}", "format=onnx", f"output={tmp_path / 'no'}"))


def test_a_hard_routed_export_equals_the_mixture_with_hard_routing(
    config: Compose, finished: tuple[RunConfig, Result], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from finsa.stages import export

    texts = [record["text"] for record in lines(folder(finished[1]) / "predictions.jsonl")]
    words = ("format=merged", "stage.force=true", "stage.timed=2", f"output={tmp_path / 'bundle'}")
    export.run(config("stage=export", f"run={folder(finished[1])}", *words))
    mixture = predictor.restore(str(folder(finished[1])), 4096)
    with mixture.model.routed("hard"):  # type: ignore[union-attr]
        wanted = mixture(texts)
    mixture.close()
    found = predictor.restore(str(tmp_path / "bundle"), 4096)(texts)
    assert found.experts == ("news", "forum")
    assert (found.gates == wanted.gates).all()
    assert np.abs(found.log_probs - wanted.log_probs).max() < 1e-4
    for name in found.experts:
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "bundle" / "experts" / name).config.vocab_size
    (tmp_path / "bundle" / "experts" / "forum" / "config.json").unlink()
    with pytest.raises(ModelError, match="expert forum: there is no model"):
        predictor.restore(str(tmp_path / "bundle"), 4096)
