"""Score a split with a finished run, or with the base model."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from finsa.config import EvaluateStage, MoeJointStage, RunConfig
from finsa.config.base import headline
from finsa.data import dataset, few_shot, tokenized
from finsa.data.values import TASKS
from finsa.errors import ConfigError, Problem
from finsa.evaluation import audit, metrics, moe, run_results, selective, tables
from finsa.inference import predictor, receipts
from finsa.inference.predictor import Predictor, Record
from finsa.models import quantization, tokenizers
from finsa.runs import processes, run_folder, trackers
from finsa.runs.progress import Display
from finsa.runs.run_folder import Result, RunFolder
from finsa.session import Session
from finsa.training import preflight


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Rebuild model and prompt from a run folder and score a split; without a run, score the base model zero-shot."""
    session = session or Session()
    record = None if cfg.run is None else predictor.read(cfg.run)
    trained = cfg if record is None else predictor.with_named_data(cfg, record, session)
    assert isinstance(cfg.stage, EvaluateStage)
    split: str = cfg.stage.split
    data = dataset.load(trained.data, session)
    data.require(split)
    if record is None and cfg.method.baseline is None:
        preflight.require_prompt(cfg, data, session)
    else:
        quantization.require_library(trained.method)
    _check_protocol(cfg, trained, record, data)
    given = record or Record(Path(), trained, {}, data.labels)
    given = predictor.for_inference(given, cfg.model.inference)
    rule = _selection(cfg.stage, record, data)
    predictor.announce(record.name if record else trained.model.name)
    from finsa.models import hardware
    from finsa.models.moe import mixture  # torch takes seconds to import: after the checks

    if record is not None and isinstance(trained.stage, MoeJointStage):
        moe.require_known_domains(
            trained.stage, mixture.expert_names(record.path), data.splits[split]["domain"].to_list()
        )
    labeled = _labeled(trained, data, record, session)
    hardware.prepare(cfg.train)
    with (
        run_folder.start(cfg, data.fingerprint, session, trained) as folder,
        trackers.track(cfg, folder.path, session.group) as tracker,
    ):
        if record is not None:
            model = predictor.load(given, cfg.train.score_tokens, session=session)
        else:
            assert isinstance(labeled, tokenized.TokenizedDataset)
            model = predictor.zero_shot(cfg, labeled, cfg.train.score_tokens, session)
        try:
            if cfg.model.inference == "int8":
                receipt = receipts.quantize(model, *receipts.rows_of(labeled, split))
                folder.write_json(receipts.FILE, receipt)
                print(receipts.describe(receipt))
            report, more = _score(cfg, labeled, model, folder, rule)
            results = {split: report, **more}
        finally:
            model.close()
        name = trained.method.name if record else f"{trained.model.name} (zero-shot)"
        folder.note(**labeled.fingerprints(), run=str(record.path if record else None), data=trained.data.name)
        run_results.write_ledger(labeled, folder, (split,) if trained.method.baseline is None else tuple(data.splits))
        folder.write_json("metrics.json", results)
        if processes.is_main():
            figure = run_results.draw_predictions(results[split], f"{name}, {split}", folder.path)
            if figure is not None:
                tracker.figure(figure.stem.replace("_", " "), figure)
            run_results.write_page(trained.model_copy(update={"stage": cfg.stage}), folder, name, split)
        tracker.summary(run_results.flat(results))
    method = trained.method
    if record is None:  # the base model, whatever the default method of the command
        method = method.model_copy(update={"learn": "nothing", "head": "lm", "baseline": None})
    tables.show_report(results[split], f"{name} on the {split} split, by class", method)
    tables.scores({name: results[split]}, f"{trained.data.title}, {split} split").show()
    if rule is not None:
        title = f"Abstaining and label sets on the {split} split"
        selective.table({name: results["selection"]}, title).show()
    print(f"run folder: {folder.path}")
    score = results[split][headline(trained.data.task)] if split == "validation" else None
    return Result("evaluate", folder.path, results, score)


def _score(
    cfg: RunConfig, labeled: tokenized.Labeled, model: Predictor, folder: RunFolder, rule: selective.Rule | None
) -> tuple[Any, Any]:
    """Predict a split by the configured protocol and write the predictions.

    Returns:
        The metrics of the split; and further entries of ``metrics.json``: calibration, selection, and routing of a
        mixture.
    """
    assert isinstance(cfg.stage, EvaluateStage)
    split: str = cfg.stage.split
    display = Display(cfg.train.progress_seconds)
    if cfg.stage.protocol == "label":
        started = time.monotonic()
        with display.work(f"scoring {split}", labeled.dataset.splits[split].height) as work:
            log_probs = model.score(labeled, split, work.moved)
        folder.note(scoring=model.rule, protocol="label", scoring_seconds=round(time.monotonic() - started, 3))
        if model.thoughts is not None:
            assert isinstance(labeled, tokenized.TokenizedDataset)
            lengths = labeled.prompts(split).lengths
            folder.note(prompt_tokens=round(float(lengths.mean()), 1), **model.costs)
        gates, experts = model.gates, model.experts
        known = {"temperature": 1.0, **(model.facts.get("calibration") or {})}
        calibrated = run_results.calibration(labeled, {split: log_probs}, known)
        rows = run_results.predictions(labeled, split, log_probs, calibrated, gates, experts)
        more: dict[str, Any] = {"calibration": calibrated}
        if rule is not None:
            probs = metrics.probabilities(log_probs, calibrated["temperature"])
            more["selection"] = selective.realized(rule, probs, np.array(labeled.gold(split)))
            cells = [dict(zip(rule.columns, one, strict=True)) for one in zip(*rule.cells(probs).values(), strict=True)]
            rows = ({**row, **cell} for row, cell in zip(rows, cells, strict=True))
        folder.write_lines("predictions.jsonl", run_results.with_thoughts(rows, model.thoughts))
        if gates is not None and not model.record.members:
            domains = labeled.dataset.splits[split]["domain"].to_list()
            more["router"] = moe.analyze_gates(gates, domains, experts)
        return run_results.report(labeled, split, log_probs, calibrated), more
    from finsa.inference.generation import Generator

    assert isinstance(labeled, tokenized.TokenizedDataset)
    words, parsing = labeled.dataset.labels.words, cfg.stage.parse
    generate = Generator(model.model, labeled.renderer, cfg.train.score_tokens, cfg.stage.answer_tokens)
    prompts = labeled.prompts(split)
    with display.work(f"answering {split}", len(prompts)) as work:
        texts = generate(prompts, work.moved)
    parsed = [audit.parse(text, words, parsing) for text in texts]
    folder.note(scoring=f"generated, parsed by {parsing}", protocol="generate")
    folder.write_lines("answers.jsonl", run_results.answers(labeled, split, texts, parsed))
    result = metrics.report_parsed(labeled.gold(split), parsed, labeled.dataset.labels.names)
    print(f"answers that name no label: {sum(result['unparsable'].values()):,} of {len(texts):,} (answers.jsonl)")
    return result, {}


def _check_protocol(cfg: RunConfig, trained: RunConfig, record: Record | None, data: dataset.Dataset) -> None:
    """Check that the model can generate answers, and that the parsing rule fits the labels.

    Raises:
        ConfigError: if answers cannot be generated or parsed.
    """
    stage = cfg.stage
    assert isinstance(stage, EvaluateStage)
    if stage.protocol == "label":
        return
    if cfg.model.inference == "int8":
        raise ConfigError([Problem("model.inference", "int8 scores labels; leave stage.protocol=generate out")])
    if trained.data.task in TASKS:
        text = f"generate needs one class per row, and this is task={trained.data.task}; leave stage.protocol out"
        raise ConfigError([Problem("stage.protocol", text)])
    form = record.manifest.get("format", "merged") if record else "merged"
    if trained.method.baseline is not None or trained.method.head != "lm" or form not in ("merged", "adapter"):
        text = "generate needs a language model that answers in words; leave stage.protocol out"
        raise ConfigError([Problem("stage.protocol", text)])
    words, letters = data.labels.words, ("letter", "letter_strict", "letter_last")
    if stage.parse in letters and not all(re.fullmatch("[A-Z]", word) for word in words):
        text = f"{stage.parse} reads options that are one capital letter; the labels are {', '.join(words)}"
        raise ConfigError([Problem("stage.parse", f"{text}: choose aidf or finllm")])


def _selection(stage: EvaluateStage, record: Record | None, data: dataset.Dataset) -> selective.Rule | None:
    """The thresholds of limits of risk and coverage; None without limits.

    Raises:
        ConfigError: if there is no run, no probability, or the rows to score are those that thresholds are chosen on.
    """
    if stage.risk is None and stage.coverage is None:
        return None
    text = None
    if record is None or stage.protocol != "label":
        text = "need run=<folder> and stage.protocol=label, because they are met by the probabilities of a finished run"
    elif chosen := selective.of_run(stage, record.path, record.labels):
        if chosen[1].origin != (data.fingerprint, stage.split):
            return chosen[0]
        text = f"are met on the {stage.split} rows; scored on the same rows, they would look better than they are"
    raise ConfigError([Problem("stage.risk and stage.coverage", str(text))])


def _labeled(trained: RunConfig, data: dataset.Dataset, record: Record | None, session: Session) -> tokenized.Labeled:
    if trained.method.baseline is not None:
        return tokenized.Labeled(data, **tokenized.labeled_settings(trained, session))
    tokenizer = predictor.tokenizer_of(record) if record else tokenizers.load_tokenizer(trained.model)
    examples = few_shot.read(trained.method.examples, record.path, trained.seed) if record else None
    return tokenized.build(trained, data, tokenizer, session, examples)
