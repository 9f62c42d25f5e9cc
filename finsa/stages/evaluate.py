"""Score a split with a finished run, or with the bare model."""

from __future__ import annotations

import re
from typing import Any

from finsa.config import EvaluateStage, MoeJointStage, RunConfig
from finsa.data import dataset, tokenized
from finsa.errors import ConfigError, Problem
from finsa.evaluation import metrics, moe, run_results, tables
from finsa.inference import predictor
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
    _check_protocol(cfg.stage, trained, record, data)
    predictor.announce(record.name if record else trained.model.name)
    from finsa.models import hardware
    from finsa.models.moe import mixture  # torch takes seconds to import: after the checks

    if record is not None and isinstance(trained.stage, MoeJointStage):
        moe.require_known_domains(trained.stage, mixture.names(record.path), data.splits[split]["domain"].to_list())
    job = _job(trained, data, record, session)
    hardware.prepare(cfg.train)
    with (
        run_folder.start(cfg, data.fingerprint, session) as folder,
        trackers.track(cfg, folder.path, session.group) as tracker,
    ):
        if record is not None:
            answerer = predictor.load(record, cfg.train.score_tokens, session=session)
        else:
            assert isinstance(job, tokenized.TokenizedDataset)
            answerer = predictor.zero_shot(cfg, job, cfg.train.score_tokens, session)
        try:
            report, more = _judge(cfg, job, answerer, folder)
            found = {split: report, **more}
        finally:
            answerer.close()
        name = trained.method.name if record else f"{trained.model.name} (zero-shot)"
        folder.note(**job.fingerprints(), run=str(record.path if record else None))
        run_results.write_ledger(job, folder, (split,) if trained.method.baseline is None else tuple(data.splits))
        folder.write_json("metrics.json", found)
        if processes.is_main():
            tracker.figure(
                "confusion matrix", run_results.draw_confusion_matrix(found[split], f"{name}, {split}", folder.path)
            )
            run_results.write_page(trained.model_copy(update={"stage": cfg.stage}), folder, name, split)
        tracker.summary(run_results.flat(found))
    method = trained.method
    if record is None:  # the base model, whatever method the command's defaults name
        method = method.model_copy(update={"learn": "nothing", "head": "lm", "baseline": None})
    tables.show_report(found[split], f"{name} on the {split} split, by class", method)
    tables.scores({name: found[split]}, f"{trained.data.title}, {split} split").show()
    print(f"run folder: {folder.path}")
    return Result("evaluate", folder.path, found, found[split]["macro_f1"] if split == "validation" else None)


def _judge(cfg: RunConfig, job: tokenized.Labelled, answerer: Predictor, folder: RunFolder) -> tuple[Any, Any]:
    """Answer a split by the protocol and write the answers down.

    Returns:
        The comparison with the truth, and what else ``metrics.json`` gets: the calibration, a mixture's router.
    """
    assert isinstance(cfg.stage, EvaluateStage)
    split: str = cfg.stage.split
    display = Display(cfg.train.progress_seconds)
    if cfg.stage.protocol == "label":
        with display.work(f"scoring {split}", job.dataset.splits[split].height) as work:
            log_probs = answerer.score(job, split, work.moved)
        folder.note(scoring=answerer.rule, protocol="label")
        gates, experts = answerer.gates, answerer.experts
        rows = run_results.predictions(job, split, log_probs, answerer.temperature, gates, experts)
        folder.write_lines("predictions.jsonl", rows)
        more: dict[str, Any] = {"calibration": run_results.calibration(job, {split: log_probs}, answerer.temperature)}
        if gates is not None:
            domains = job.dataset.splits[split]["domain"].to_list()
            more["router"] = moe.analyze_gates(gates, domains, experts)
        return run_results.report(job, split, log_probs), more
    from finsa.inference.generation import Generator, parse

    assert isinstance(job, tokenized.TokenizedDataset)
    words, rule = job.dataset.labels.words, cfg.stage.parse
    generate = Generator(answerer.model, job.renderer, cfg.train.score_tokens, cfg.stage.answer_tokens)
    prompts = job.prompts(split)
    with display.work(f"answering {split}", len(prompts)) as work:
        texts = generate(prompts, work.moved)
    parsed = [parse(text, words, rule) for text in texts]
    folder.note(scoring=f"generated, parsed by {rule}", protocol="generate")
    folder.write_lines("answers.jsonl", run_results.answers(job, split, texts, parsed))
    result = metrics.report_parsed(job.gold(split), parsed, job.dataset.labels.names)
    print(f"answers that name no label: {sum(result['unparsable'].values()):,} of {len(texts):,} (answers.jsonl)")
    return result, {}


def _check_protocol(stage: EvaluateStage, trained: RunConfig, record: Record | None, data: dataset.Dataset) -> None:
    """A model that reads no words generates none, and letters have to be among the labels.

    Raises:
        ConfigError: where answers cannot be generated or parsed.
    """
    if stage.protocol == "label":
        return
    form = record.manifest.get("format", "merged") if record else "merged"
    if trained.method.baseline is not None or trained.method.head != "lm" or form not in ("merged", "adapter"):
        text = "generate needs a language model that answers in words; leave stage.protocol out"
        raise ConfigError([Problem("stage.protocol", text)])
    words, letters = data.labels.words, ("letter", "letter_strict", "letter_last")
    if stage.parse in letters and not all(re.fullmatch("[A-Z]", word) for word in words):
        text = f"{stage.parse} reads options that are one capital letter; the labels are {', '.join(words)}"
        raise ConfigError([Problem("stage.parse", f"{text}: choose aidf or finllm")])


def _job(trained: RunConfig, data: dataset.Dataset, record: Record | None, session: Session) -> tokenized.Labelled:
    if trained.method.baseline is not None:
        return tokenized.Labelled(data)
    tokenizer = predictor.tokenizer_of(record) if record else tokenizers.load_tokenizer(trained.model)
    return tokenized.build(trained, data, tokenizer, session)
