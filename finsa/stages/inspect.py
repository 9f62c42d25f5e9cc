"""Show the rows as the model sees them, and anomalies of the data; no weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl

from finsa.config import InspectStage, RunConfig
from finsa.data import dataset, discovery, near_duplicates, sources, tokenized
from finsa.evaluation import examples, inspection, inspection_figures, pages, run_results, tables
from finsa.models import tokenizers
from finsa.runs import run_folder, trackers
from finsa.runs.run_folder import Result
from finsa.session import Session

FILE_SOURCES = ("table", "alpaca", "messages")


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Print examples, ledger, overlaps and shortcut features; write a page, figures and numbers to a run folder."""
    session = session or Session()
    assert isinstance(cfg.stage, InspectStage)
    data = dataset.load(cfg.data, session)
    tokenizer, whose, style = tokenizers.load_or_embedded(cfg.model, local_only=False)
    labeled = tokenized.build(cfg.model_copy(update={"model": style}), data, tokenizer, session)
    close = near_duplicates.find(data.splits, cfg.data.near_duplicates)
    numbers = inspection.inspect(
        labeled, close, cfg.data.near_duplicates, cfg.stage, _files(cfg, inspection.used_rows(labeled))
    )
    if style != cfg.model:
        numbers["findings"].insert(0, f"Tokens, masks and examples are those of another tokenizer: {whose}.")
    shown = examples.examples(labeled, cfg, cfg.stage.examples)
    with (
        run_folder.start(cfg, data.fingerprint, session) as folder,
        trackers.track(cfg, folder.path, session.group) as tracker,
    ):
        figures = inspection_figures.draw(labeled, numbers, close, folder.path)
        folder.note(**labeled.fingerprints())
        run_results.write_ledger(labeled, folder, tuple(data.splits))
        folder.write_json("inspect.json", numbers)
        folder.write_lines("near_duplicates.jsonl", _pairs(close.pairs, data.labels.names))
        contents = inspection.sections(numbers, data.ledger.as_dict(labeled.truncated()), close, cfg.stage.pairs)
        sections = [(name, found, figures[name]) for name, found in contents.items()]
        title, facts = f"finsa: inspection of {cfg.data.title}", _facts(cfg, data, whose)
        page = pages.render(title, facts, numbers["findings"], sections, examples=shown)
        folder.write_text("inspect.html", page)
        for _, _, drawn in sections:
            for figure in drawn:
                tracker.figure(figure.title, figure.file)
        tracker.summary(run_results.flat({"inspect": _summary(numbers)}))
    examples.show(shown)
    tables.show_ledger(data.ledger, labeled.truncated())
    inspection.near_table(numbers["near_duplicates"]).show()
    for group in numbers["groups"]:
        inspection.group_table(group).show()
    tables.console().print("findings", style="bold")
    for sentence in numbers["findings"]:
        tables.console().print(f"- {sentence}", markup=False, highlight=False)
    print(f"tokenizer: {whose}\npage: {folder.path / 'inspect.html'}")
    return Result("inspect", folder.path, _summary(numbers))


def _files(cfg: RunConfig, rows: pl.DataFrame) -> pl.Series | None:
    """The file of every used row; None unless some split has several files."""
    if cfg.data.generator is not None or cfg.data.source not in FILE_SOURCES:
        return None
    found = discovery.find_files(cfg.data)
    if len(found) <= len(set(found.values())):
        return None
    return inspection.files_of(rows, sources.collect(cfg.data, found).frame)


def _pairs(pairs: pl.DataFrame, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Near duplicates, with the names of their labels."""
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


def _summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """The main numbers of the inspection, for a comparison of data sets."""
    between = numbers["near_duplicates"]["between"]
    return {
        "rows": {split: of["rows"] for split, of in numbers["splits"].items()},
        "near_duplicates": {f"{one['held_out']}-{one['other']}": one["share"] for one in between},
        "association": {found["kind"]: found["association"] for found in numbers["groups"]},
    }
