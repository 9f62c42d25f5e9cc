"""Write the splits of a data set, with variants of its training rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from finsa.config import AugmentStage, Paraphrase, RunConfig
from finsa.data import augment, dataset, dataset_writer
from finsa.data.dataset import Dataset
from finsa.data.endpoint import Chat, Journal, Question
from finsa.data.readers import FATE
from finsa.runs.run_folder import Result
from finsa.session import Session


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Generate variants of the training rows, and write all rows to ``output``.

    Raises:
        RunError: if the output already exists, another process is writing it, or the endpoint cannot be used.
        DataError: if there are no training rows.
    """
    session = session or Session()
    with dataset_writer.claimed(cfg.output) as partial:
        return _write(cfg, partial, session)


def _write(cfg: RunConfig, partial: Path, session: Session) -> Result:
    knobs = cfg.stage
    assert isinstance(knobs, AugmentStage)
    chat = _chat(knobs, partial)
    data = dataset.load(cfg.data, session)
    data.require("train")
    splits = _named(data)
    held = pl.concat([splits["validation"], splits["test"]])
    train = augment.with_unique_ids(splits["train"], set(held["id"]))
    proposed = _proposed(train.filter(pl.col("parent").is_null()), knobs, chat, cfg.seed)
    judged = augment.judge(proposed, train, held["text"], knobs.shortest, knobs.longest)
    made = judged.filter(pl.col(FATE).is_null())
    made = made.with_columns(augment.unique_ids(made["id"], {*train["id"], *held["id"]}))
    splits["train"] = pl.concat([train, made.select(augment.COLUMNS)])
    recipe = _recipe(cfg, data, train, judged)
    for split in ("validation", "test"):  # without an empty column, so that these files do not change
        splits[split] = splits[split].drop([] if splits[split]["parent"].drop_nulls().len() else ["parent"])
    folder = dataset_writer.publish(partial, splits, ("augmentation.json", recipe))
    for kind, numbers in recipe["variants"].items():
        print(f"{kind}: {numbers}")
    print(f"wrote {train.height:,} training rows and {made.height:,} variants to {folder}")
    print(f"read them with: {dataset_writer.overrides(cfg.data, folder, augment.COLUMNS)}")
    return Result("augment", None, {"rows": {split: part.height for split, part in splits.items()}})


def _chat(knobs: AugmentStage, partial: Path) -> Chat | None:
    if knobs.paraphrase is None or knobs.paraphrase.model is None:
        return None
    journal = Journal(partial / dataset_writer.ANSWERS)
    if journal.kept:
        print(f"resuming with {journal.kept:,} answers in {journal.file}")
    return Chat(knobs.paraphrase, "stage.paraphrase", journal)


def _named(data: Dataset) -> dict[str, pl.DataFrame]:
    """The splits with names of classes, and null for blank cells."""
    names = dict(enumerate(data.labels.names))
    label = pl.col("label").replace_strict(names, return_dtype=pl.String)
    filled = (pl.when(pl.col(name) != "").then(name).alias(name) for name in ("domain", "parent"))
    columns = [label, *filled]
    return {split: part.with_columns(columns).select(augment.COLUMNS) for split, part in data.splits.items()}


def _proposed(rows: pl.DataFrame, knobs: AugmentStage, chat: Chat | None, seed: int) -> pl.DataFrame:
    parts = []
    if knobs.synonyms is not None:
        drawn = augment.draw(rows, knobs.synonyms.share, seed)
        parts.append(augment.propose_synonyms(drawn, knobs.synonyms.words, knobs.synonyms.variants, seed))
    if knobs.paraphrase is not None and chat is not None:
        parts.append(_paraphrases(rows, knobs.paraphrase, chat, seed))
    return pl.concat(parts)


def _paraphrases(rows: pl.DataFrame, paraphrase: Paraphrase, chat: Chat, seed: int) -> pl.DataFrame:
    drawn = augment.draw(rows, paraphrase.share, seed, last=True)
    questions = [
        Question(paraphrase.prompt.format(text=text, label=label), number)
        for text, label in drawn.select("text", "label").iter_rows()
        for number in range(paraphrase.variants)
    ]
    answers = [(answer.text, answer.fault) for answer in chat.ask(questions)]
    starts = range(0, len(answers), paraphrase.variants)
    return augment.propose(drawn, "paraphrase", [answers[start : start + paraphrase.variants] for start in starts])


def _recipe(cfg: RunConfig, data: Dataset, train: pl.DataFrame, judged: pl.DataFrame) -> dict[str, Any]:
    labels = dict.fromkeys(data.labels.names, 0)
    per_label = {
        "originals": labels | dict(train.group_by("label").len().iter_rows()),
        "variants": labels | dict(judged.filter(pl.col(FATE).is_null()).group_by("label").len().iter_rows()),
    }
    kinds = judged.partition_by("kind", as_dict=True, maintain_order=True)
    return {
        "command": f"python run.py stage=augment data={cfg.data.name} output=<folder>",
        "seed": cfg.seed,
        "stage": cfg.stage.model_dump(),
        "data": {"name": cfg.data.name, "files": cfg.data.files, "fingerprint": data.fingerprint},
        "ledger": dict(data.ledger.buckets),
        "variants": {str(kind[0]): augment.count(part) for kind, part in kinds.items()},
        "labels": per_label,
    }
