"""Write labeled rows that a model generates from a prompt, or its rationales of labeled rows."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

from finsa.config import RunConfig, SynthesizeStage
from finsa.data import dataset, dataset_writer
from finsa.data.endpoint import KEPT, Chat, Journal, Question
from finsa.data.labels import LabelSpace
from finsa.data.synthesize import Harvest, in_blocks, reasons_of
from finsa.errors import RunError
from finsa.runs.run_folder import Result
from finsa.session import Session

COLUMNS = ("id", "text", "label")


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Request rows of every class until there are enough, or rationales of training rows, and write ``output``.

    Raises:
        RunError: if the output already exists, another process is writing it, the endpoint cannot be used, or there
            are too few rows after the last round.
    """
    assert isinstance(cfg.stage, SynthesizeStage)
    with dataset_writer.claimed(cfg.output) as partial:
        if cfg.stage.write == "rationales":
            return _write_rationales(cfg, cfg.stage, partial, session or Session())
        return _write(cfg, partial)


def _write(cfg: RunConfig, partial: Path) -> Result:
    knobs = cfg.stage
    assert isinstance(knobs, SynthesizeStage)
    labels = LabelSpace.of(cfg.data, ())
    harvest = _harvest(knobs, labels, _chat(knobs, partial))
    splits = {"train": in_blocks(harvest.texts, 0, knobs.train, knobs.block, "train")}
    if knobs.validation:
        splits["validation"] = in_blocks(harvest.texts, knobs.train, harvest.wanted, knobs.block, "valid")
    folder = dataset_writer.publish(partial, splits, ("recipe.json", _recipe(cfg, labels, harvest)))
    rows = {split: part.height for split, part in splits.items()}
    print(f"{dict(harvest.counts)}\nwrote {rows} to {folder}")
    print(f"read them with: {dataset_writer.overrides(cfg.data, folder, COLUMNS)}")
    return Result("synthesize", None, {"rows": rows})


def _write_rationales(cfg: RunConfig, knobs: SynthesizeStage, partial: Path, session: Session) -> Result:
    """Let the model label training rows, and write those whose label it finds with its reasons.

    Validation and test rows are written unchanged, and are not shown to the model.
    """
    data, chat = dataset.load(cfg.data, session), _chat(knobs, partial)
    data.require("train")
    words, rows = data.labels.words, data.splits["train"]
    drawn = pl.int_range(pl.len()).shuffle(seed=cfg.seed).over("label") < knobs.train
    rows = rows.filter(drawn).with_columns(pl.lit(None, pl.String).alias("rationale"))
    gold, kept, counts = rows["label"].to_list(), dict[int, str](), Counter[str]()
    known = [
        {"text": text, "target": target or "", "labels": " / ".join(words)}
        for text, target in rows.select("text", "target").iter_rows()
    ]
    for attempt in range(knobs.rounds):
        asked = [number for number in range(len(gold)) if number not in kept]
        answers = chat.ask([Question(knobs.rationale_prompt.format(**known[number]), attempt) for number in asked])
        for number, answer in zip(asked, answers, strict=True):
            reasons, label = reasons_of(answer.text, words)
            if answer.fault is not None:
                fate = answer.fault
            elif label is None or not reasons:
                fate = "dropped: no label in the last line, or no reasons before it"
            elif label != gold[number]:
                fate = "dropped: wrong label"
            else:
                fate, kept[number] = "kept", reasons
            counts[fate] += 1
    if not kept:
        raise RunError(f"stage.rationale_prompt: no answer has reasons and the right label ({dict(counts)}). {KEPT}")
    named = pl.col("label").replace_strict(dict(enumerate(data.labels.names)), return_dtype=pl.String)
    rows = rows.with_columns(pl.Series("rationale", [kept.get(number) for number in range(len(gold))], pl.String))
    splits = {**data.splits, "train": rows.filter(pl.col("rationale").is_not_null())}
    target = ["target"] if cfg.data.columns.target is not None else []
    domain = ["domain"] if any(part["domain"].null_count() < part.height for part in splits.values()) else []
    columns = ["id", "text", *target, "label", *domain, "rationale"]
    splits = {split: part.with_columns(named).select(columns) for split, part in splits.items()}
    recipe = {
        "command": f"python run.py stage=synthesize stage.write=rationales data={cfg.data.name} output=<folder>",
        "stage": knobs.model_dump(),
        "data": {"name": cfg.data.name, "files": cfg.data.files, "fingerprint": data.fingerprint},
        "counts": dict(counts),
    }
    folder = dataset_writer.publish(partial, splits, ("recipe.json", recipe))
    print(f"{dict(counts)}\nwrote rationales of {len(kept):,} of {len(gold):,} training rows to {folder}")
    print(f"read them with: {dataset_writer.overrides(cfg.data, folder, columns)}")
    return Result("synthesize", None, {"rows": {split: part.height for split, part in splits.items()}})


def _chat(knobs: SynthesizeStage, partial: Path) -> Chat:
    journal = Journal(partial / dataset_writer.ANSWERS)
    if journal.kept:
        print(f"resuming with {journal.kept:,} answers in {journal.file}")
    return Chat(knobs, "stage", journal)


def _harvest(knobs: SynthesizeStage, labels: LabelSpace, chat: Chat) -> Harvest:
    """Request texts in rounds; each round requests the missing ones of all classes concurrently."""
    harvest = Harvest.of(labels.names, knobs.train + knobs.validation)
    asked = dict.fromkeys(labels.names, 0)
    for _ in range(knobs.rounds):
        questions = list[tuple[str, Question]]()
        for label in labels.names:
            prompt = knobs.prompt.format(label=label, labels="、".join(labels.names), count=knobs.block)
            blocks = math.ceil(harvest.missing(label) / knobs.block)
            questions += [(label, Question(prompt, asked[label] + number)) for number in range(blocks)]
            asked[label] += blocks
        answers = chat.ask([question for _, question in questions])
        for (label, _), answer in zip(questions, answers, strict=True):
            if answer.fault is None:
                harvest.add(label, answer.text)
            else:
                harvest.counts[answer.fault] += 1
        if not any(map(harvest.missing, labels.names)):
            return harvest
    short = ", ".join(f"{label} {len(texts)}" for label, texts in harvest.texts.items() if harvest.missing(label))
    raise RunError(
        f"stage.rounds: after {knobs.rounds} rounds there are fewer than {harvest.wanted} rows of {short} "
        f"({dict(harvest.counts)}). Set a higher stage.rounds or stage.temperature, or fewer rows. {KEPT}"
    )


def _recipe(cfg: RunConfig, labels: LabelSpace, harvest: Harvest) -> dict[str, Any]:
    return {
        "command": f"python run.py stage=synthesize data={cfg.data.name} output=<folder>",
        "stage": cfg.stage.model_dump(),
        "labels": list(labels.names),
        "counts": dict(harvest.counts),
    }
