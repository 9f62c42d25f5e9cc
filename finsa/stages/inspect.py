"""Show the rows as the model will see them, and what is odd about them; no weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from finsa.config import InspectStage, RunConfig
from finsa.data import dataset, discovery, near_duplicates, sources, tokenized
from finsa.evaluation import (
    examples,
    inspect_figures,
    inspect_page,
    inspect_terminal,
    inspection,
    run_results,
    tables,
)
from finsa.evaluation.figures import Figure
from finsa.models import tokenizers
from finsa.runs import run_folder, trackers
from finsa.runs.run_folder import Result
from finsa.session import Session

FILE_SOURCES = ("table", "alpaca", "messages")


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Print examples, ledger, overlaps and confounds; write page, figures and numbers into a run folder."""
    session = session or Session()
    assert isinstance(cfg.stage, InspectStage)
    data = dataset.load(cfg.data, session)
    tokenizer, whose, style = tokenizers.own_or_embedded(cfg.model, local_only=False)
    job = tokenized.build(cfg.model_copy(update={"model": style}), data, tokenizer, session)
    close = near_duplicates.find(data.splits, cfg.data.near_duplicates)
    numbers = inspection.inspect(
        job, close, cfg.data.near_duplicates, cfg.stage, _files(cfg, inspection.used_rows(job))
    )
    if style != cfg.model:
        numbers["findings"].insert(0, f"Tokens, masks and examples are those of another tokenizer: {whose}.")
    shown = examples.examples(job, cfg, cfg.stage.examples)
    with (
        run_folder.start(cfg, data.fingerprint, session) as folder,
        trackers.track(cfg, folder.path, session.group) as tracker,
    ):
        figures = _draw(job, numbers, close, folder.path)
        folder.note(**job.fingerprints())
        run_results.write_ledger(job, folder, tuple(data.splits))
        folder.write_json("inspect.json", numbers)
        folder.write_lines("near_duplicates.jsonl", _pairs(close.pairs, data.labels.names))
        page = inspect_page.Page(
            title=f"finsa: inspection of {cfg.data.title}",
            facts=_facts(cfg, data, whose),
            numbers=numbers,
            ledger=data.ledger.as_dict(job.truncated()),
            examples=shown,
            figures=figures,
            near=close,
            shown=cfg.stage.pairs,
        )
        folder.write_text("inspect.html", inspect_page.render(page))
        for figure in figures.values():
            tracker.figure(figure.title, figure.file)
        tracker.summary(run_results.flat({"inspect": _summary(numbers)}))
    inspect_terminal.show_examples(shown)
    tables.show_ledger(data.ledger, job.truncated())
    inspect_terminal.show_near(numbers["near_duplicates"])
    inspect_terminal.show_groups(numbers["groups"], data.labels.names)
    inspect_terminal.show_findings(numbers["findings"])
    print(f"tokenizer: {whose}\npage: {folder.path / 'inspect.html'}")
    return Result("inspect", folder.path, _summary(numbers))


def _files(cfg: RunConfig, rows: pl.DataFrame) -> pl.Series | None:
    """The file of every used row, where files say more than splits do."""
    if cfg.data.generator is not None or cfg.data.source not in FILE_SOURCES:
        return None
    found = discovery.find_files(cfg.data)
    if len(found) <= len(set(found.values())):
        return None
    return inspection.files_of(rows, sources.collect(cfg.data, found).frame)


def _pairs(pairs: pl.DataFrame, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Near duplicates with the names of their labels."""
    for pair in pairs.iter_rows(named=True):
        yield {**pair, "label": names[pair["label"]], "other_label": names[pair["other_label"]]}


def _facts(cfg: RunConfig, data: dataset.Dataset, whose: str) -> dict[str, str]:
    return {
        "data": cfg.data.name,
        "files": str(cfg.data.files) if cfg.data.generator is None else "drawn",
        "fingerprint": data.fingerprint,
        "model": cfg.model.name,
        "tokenizer": whose,
        "method": f"{cfg.method.name} (loss on {cfg.method.loss_on}, balance {cfg.method.balance})",
        "prompt": cfg.data.prompt,
    }


def _draw(
    job: tokenized.TokenizedDataset, numbers: dict[str, Any], close: near_duplicates.NearDuplicates, folder: Path
) -> dict[str, Figure]:
    labels, splits = job.dataset.labels.names, numbers["splits"]
    lengths = {split: inspection.row_lengths(job, split) for split in splits}
    of_splits = {"all": {split: of["labels"] for split, of in splits.items()}}
    buckets = job.dataset.ledger.closed(job.truncated())
    rows = inspection.used_rows(job)
    drawn = {
        "ledger": inspect_figures.ledger(buckets, folder / "ledger.png"),
        "labels_by_split": inspect_figures.labels_by_group("split", of_splits, labels, folder / "labels_by_split.png"),
        "token_lengths": inspect_figures.token_lengths(
            lengths, numbers["tokens"]["max_length"], folder / "token_lengths.png"
        ),
        "traits": inspect_figures.traits(rows, labels, folder / "traits.png"),
    }
    if any(sum(of["cut"].values()) for of in splits.values()):
        drawn["truncation"] = inspect_figures.truncation(splits, labels, folder / "truncation.png")
    if close.pairs.height:
        drawn["near_duplicates"] = inspect_figures.near_duplicates(
            close.pairs, numbers["near_duplicates"]["threshold"], folder / "near_duplicates.png"
        )
    for found in numbers["groups"]:
        name = f"labels_by_{found['kind'].replace(' ', '_')}"
        counts = {
            split: {group["name"]: group["splits"].get(split, {}) for group in found["groups"]} for split in splits
        }
        drawn[name] = inspect_figures.labels_by_group(found["kind"], counts, labels, folder / f"{name}.png")
    return drawn


def _summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """The numbers that stand for the inspection in a comparison of data sets."""
    between = numbers["near_duplicates"]["between"]
    return {
        "rows": {split: of["rows"] for split, of in numbers["splits"].items()},
        "near_duplicates": {f"{one['held_out']}-{one['other']}": one["share"] for one in between},
        "association": {found["kind"]: found["association"] for found in numbers["groups"]},
    }
