"""Score a split with a finished run, or with the bare model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from finsa import baselines, runs, tracking
from finsa.config import Data, EvaluateStage, Model, MoeJointStage, RunConfig
from finsa.data import table, task
from finsa.evaluation import outcome, router, tables
from finsa.inference.scoring import scorer
from finsa.modeling import base, hardware, learner, mixture, quantization, tokenizers
from finsa.runs import Result


def run(cfg: RunConfig) -> Result:
    """Rebuild model and prompt from a run folder and score a split; without a run, score the base as it is."""
    trained, source, place = (cfg, None, None) if cfg.run is None else _of_run(cfg)
    quantization.require_library(trained.method)
    assert isinstance(cfg.stage, EvaluateStage)
    split: str = cfg.stage.split
    data = table.load(trained.data)
    data.require(split)
    if source is not None and isinstance(trained.stage, MoeJointStage):
        router.require_known(trained.stage, mixture.names(source), data.splits[split]["domain"].to_list())
    job = _job(trained, data)
    hardware.prepare(cfg.train)
    with runs.start(cfg, data.fingerprint) as folder, tracking.track(cfg, folder.path, runs.sweep_name()) as tracker:
        if isinstance(job, task.Task):
            scores, rule, routed = _score(cfg, trained, source, place, job, split)
        else:
            (scores, rule), routed = _score_baseline(trained, source, job, split), None
        metrics = {split: outcome.report(job, split, scores)}
        if routed is not None:
            gates, experts = routed
            metrics["router"] = router.analysis(gates, data.splits[split]["domain"].to_list(), experts)
        name = trained.method.name if source else f"{trained.model.name} as it is"
        folder.note(**job.fingerprints(), scoring=rule, run=str(source))
        outcome.write_ledger(job, folder)
        folder.write_json("metrics.json", metrics)
        folder.write_lines("predictions.jsonl", outcome.predictions(job, split, scores, *(routed or ())))
        tracker.figure("confusion matrix", outcome.draw(metrics[split], f"{name}, {split}", folder.path))
        tracker.summary(outcome.flat(metrics))
    tables.show_report(metrics[split], f"{name} on the {split} split, by class")
    tables.show_comparison({name: metrics[split]}, f"{trained.data.name}, {split} split")
    print(f"run folder: {folder.path}")
    return Result("evaluate", folder.path, metrics, metrics[split]["macro_f1"] if split == "validation" else None)


def _job(trained: RunConfig, data: table.Table) -> task.Labelled:
    if trained.method.baseline is not None:
        return task.Labelled(data)
    return task.build(trained, data, tokenizers.load_tokenizer(trained.model))


def _score(
    cfg: RunConfig, trained: RunConfig, source: Path | None, place: Path | None, job: task.Task, split: str
) -> tuple[Any, str, Any]:
    """Scores of a split by the run's language model or the bare one, their rule, and a mixture's gates and experts."""
    model: Any = base.load_base(_weights(trained, source), trained.seed, quantization=trained.method.quantization)
    scored = learner.restore(trained, model, place, job.renderer) if place else model
    reader = scorer(scored, job.renderer, cfg.train.score_tokens)
    scores = reader.score(job.prompts(split))
    learner.release(scored)
    routed = None if reader.gates is None else (reader.gates, scored.experts)
    return scores, reader.rule, routed


def _score_baseline(trained: RunConfig, source: Path | None, job: task.Labelled, split: str) -> tuple[Any, str]:
    assert source is not None
    assert trained.method.baseline is not None
    model = baselines.restore(trained, job.table.labels.names, source)
    job.cut.update(baselines.cut(model, job))
    return model.score(job.texts(split)), f"baseline: {trained.method.baseline.kind}"


def _of_run(cfg: RunConfig) -> tuple[RunConfig, Path, Path]:
    """The configuration of a run, its folder and its adapter's; its rows may be others, if the command names some."""
    path, trained, _ = runs.read(str(cfg.run))
    place = learner.adapter_folder(trained, path)
    named = HydraConfig.initialized() and any(text.startswith("data") for text in HydraConfig.get().overrides.task)
    if named:
        # Prompt, labels and length belong to the model that was trained with them.
        kept = {key: getattr(trained.data, key) for key in ("labels", "prompt", "max_length")}
        merged: Data = cfg.data.model_copy(update=kept)
        trained = trained.model_copy(update={"data": merged})
    return trained, path, place


def _weights(trained: RunConfig, source: Path | None) -> Model:
    """The base to load: the run's own where the whole model was trained."""
    if source is not None and (source / "model").is_dir():
        return trained.model.model_copy(update={"path": str(source / "model"), "weights": "pretrained"})
    return trained.model
