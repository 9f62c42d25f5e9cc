"""Score a split with a finished run, or with the bare model."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from finsa import runs, tracking
from finsa.config import Data, EvaluateStage, Model, RunConfig
from finsa.data import table, task
from finsa.evaluation import outcome, tables
from finsa.inference.scoring import LabelScorer
from finsa.modeling import adapters, base, hardware, tokenizers
from finsa.runs import Result


def run(cfg: RunConfig) -> Result:
    """Rebuild model and prompt from a run folder and score a split; without a run, score the base as it is."""
    trained, source = (cfg, None) if cfg.run is None else _of_run(cfg)
    assert isinstance(cfg.stage, EvaluateStage)
    split: str = cfg.stage.split
    data = table.load(trained.data)
    data.require(split)
    job = task.build(trained, data, tokenizers.load_tokenizer(trained.model))
    hardware.prepare(cfg.train)
    with runs.start(cfg, data.fingerprint) as folder, tracking.track(cfg, folder.path, runs.sweep_name()) as tracker:
        model = base.load_base(_weights(trained, source), trained.seed)
        adapter = source / "adapters" / (trained.data.domain or "default") if source else None
        scored = adapters.load(model, adapter) if adapter and adapter.is_dir() else model
        scorer = LabelScorer(scored, job.renderer, cfg.train.score_tokens)
        scores = scorer.score(job.prompts(split))
        if scored is not model:
            adapters.detach(scored)
        metrics = {split: outcome.report(job, split, scores)}
        name = trained.method.name if source else f"{trained.model.name} as it is"
        folder.note(**job.fingerprints(), scoring=scorer.rule, run=str(source))
        outcome.write_ledger(job, folder)
        folder.write_json("metrics.json", metrics)
        folder.write_lines("predictions.jsonl", outcome.predictions(job, split, scores))
        tracker.figure("confusion matrix", outcome.draw(metrics[split], f"{name}, {split}", folder.path))
        tracker.summary(outcome.flat(metrics))
    tables.show_report(metrics[split], f"{name} on the {split} split, by class")
    tables.show_comparison({name: metrics[split]}, f"{trained.data.name}, {split} split")
    print(f"run folder: {folder.path}")
    return Result("evaluate", folder.path, metrics, metrics[split]["macro_f1"] if split == "validation" else None)


def _of_run(cfg: RunConfig) -> tuple[RunConfig, Path]:
    """The configuration of a run; its rows may be others, where the command names some."""
    path, trained, _ = runs.read(str(cfg.run))
    named = HydraConfig.initialized() and any(text.startswith("data") for text in HydraConfig.get().overrides.task)
    if named:
        # Prompt, labels and length belong to the model that was trained with them.
        kept = {key: getattr(trained.data, key) for key in ("labels", "prompt", "max_length")}
        merged: Data = cfg.data.model_copy(update=kept)
        trained = trained.model_copy(update={"data": merged})
    return trained, path


def _weights(trained: RunConfig, source: Path | None) -> Model:
    """The base to load: the run's own where the whole model was trained."""
    if source is not None and (source / "model").is_dir():
        return trained.model.model_copy(update={"path": str(source / "model"), "weights": "pretrained"})
    return trained.model
