"""Find wrong labels: out-of-fold probabilities, confident learning, a page to decide about the rows, and a ceiling."""

from __future__ import annotations

import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from finsa.config import NoiseStage, RunConfig, TrainStage
from finsa.data import corrections, dataset, splits
from finsa.errors import DataError, counted
from finsa.evaluation import label_noise, metrics, pages, tables
from finsa.evaluation.tables import Table, percent, visible
from finsa.runs import files, run_folder
from finsa.runs.run_folder import Result, RunFolder
from finsa.session import Parent, Session
from finsa.training import preflight

ON_TERMINAL = 8  # suspicious rows
WRONG = (1.0, 0.5, 0.25)  # shares of the suspicious labels that are really wrong, for the table of ceilings


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Score every row by a model that was not trained on it, and write the suspicious ones and the ceiling."""
    session, stage = session or Session(), cfg.stage
    assert isinstance(stage, NoiseStage)
    data = dataset.load(cfg.data, session)
    preflight.require_trainable(cfg, data, session)
    names = data.labels.names
    rows = pl.concat(
        data.splits[split].with_columns(pl.lit(split).alias("split")) for split in dict.fromkeys(stage.splits)
    )
    gold = rows["label"].to_numpy()
    if rows.height < stage.folds * len(names):
        raise DataError(
            f"stage.folds: {counted(rows.height)} of {len(names)} labels are too few for {stage.folds} folds"
        )
    linked = rows.with_columns(pl.lit(None, dtype=pl.String).alias("part"), pl.col("text").alias("_text"))
    groups = splits.families(linked, "parent", "group", "_text").to_numpy()
    folds = splits.folds(gold.tolist(), groups, stage.folds, cfg.seed)

    with run_folder.start(cfg, data.fingerprint, session) as folder:
        # Each fold is the test split of an ordinary run.
        probs = np.zeros((rows.height, len(names)))
        for number, left_out in enumerate(folds, start=1):
            print(f"fold {number} of {stage.folds}: {counted(len(left_out))}", flush=True)
            probs[left_out] = _out_of_fold(cfg, data, rows, left_out, number, folder, session)

        found = label_noise.find(gold, probs)
        held_out = np.bincount(data.splits["test"]["label"].to_numpy(), minlength=len(names))
        ceilings = {wrong: label_noise.ceiling(found, held_out, cfg.seed, wrong) for wrong in WRONG}
        joint = label_noise.joint(found.counts, found.given)
        suspicious = _suspicious(rows, found, probs, names)
        reached = metrics.averages(
            np.bincount(gold * len(names) + probs.argmax(axis=1), minlength=len(names) ** 2).reshape(-1, len(names))
        )
        of_split = rows["split"].to_numpy()
        shares = {split: float(found.suspicious[of_split == split].mean()) for split in dict.fromkeys(of_split)}
        remarks = _remarks(found, ceilings[1.0], float(reached["accuracy"]), shares)
        numbers = {
            "rows": rows.height,
            "suspicious": suspicious.height,
            "suspicious_by_split": shares,
            **{name: float(reached[name]) for name in ("accuracy", "macro_f1")},
            "ceiling": {f"{wrong:g}": ceiling for wrong, ceiling in ceilings.items()},
            "joint": {
                one: dict(zip(names, map(float, line), strict=True)) for one, line in zip(names, joint, strict=True)
            },
        }
        folder.write_json("metrics.json", {"noise": numbers})
        with files.replacing(folder.path / "suspicious.csv") as place:
            suspicious.write_csv(place)
        scored = rows.select("id", "split").to_dicts()
        folder.write_lines(
            "out_of_fold.jsonl",
            (
                {**row, "probs": dict(zip(names, line.round(6).tolist(), strict=True))}
                for row, line in zip(scored, probs, strict=True)
            ),
        )
        shown = [_joint_table(joint, found, names), _ceiling_table(ceilings, int(held_out.sum()))]
        facts = {"data": cfg.data.title, "fingerprint": data.fingerprint, "method": cfg.method.name}
        page = (
            pages.environment(pages.TEMPLATES)
            .get_template("labels.html.j2")
            .render(
                title=f"{cfg.data.title}: suspicious labels",
                remarks=remarks,
                facts=facts | ({} if cfg.method.baseline else {"model": cfg.model.name}),
                tables=shown,
                labels=names,
                rows=suspicious.head(stage.shown).to_dicts(),
                total=suspicious.height,
                columns=corrections.COLUMNS,
            )
        )
        folder.write_text("labels.html", page)
    for table in shown:
        table.show()
    _rows_table(suspicious.head(ON_TERMINAL)).show()
    for sentence in remarks:
        tables.console().print(f"- {sentence}", markup=False, highlight=False)
    print(f"rows: {folder.path / 'suspicious.csv'}\npage: {folder.path / 'labels.html'}")
    return Result("noise", folder.path, {"noise": numbers})


def _out_of_fold(
    cfg: RunConfig,
    data: dataset.Dataset,
    rows: pl.DataFrame,
    left_out: Any,
    number: int,
    folder: RunFolder,
    session: Session,
) -> Any:
    """Train like an ordinary run on the rows of the other folds, and return the probabilities of a fold's rows, (m, c).

    Validation rows select checkpoints as in an ordinary run, except those of the fold. A finished fold is read again.
    """
    place = folder.path / "folds" / str(number)
    known = place / "run.json"
    if not (known.is_file() and json.loads(known.read_text(encoding="utf-8"))["status"] == "complete"):
        inside = rows.with_row_index("_row").with_columns(pl.col("_row").is_in(left_out.tolist()).alias("_out"))
        others = inside.filter(~pl.col("_out"))
        held = others.filter(pl.col("split") == "validation")
        parts = {
            "train": others.filter(pl.col("split") != "validation"),
            "validation": held if held.height else data.splits["validation"],
            "test": rows[left_out.tolist()],
        }
        if not parts["train"].height:  # only validation rows are scored
            parts["train"] = data.splits["train"]
        columns = data.splits["train"].columns
        fold = replace(
            data,
            splits={split: part.select(columns) for split, part in parts.items()},
            fingerprint=f"{data.fingerprint}-fold{number}",
        )
        if place.is_dir():
            files.remove(place)
        place.mkdir(parents=True)
        changed = {"stage": TrainStage(name="train", compare_base=False), "resume": False}
        nested, below = cfg.model_copy(update=changed), session.below(Parent(place, folder.path.name, lambda *_: None))
        with (place / "stdout.txt").open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
            if cfg.method.baseline is not None:
                from finsa.training import run_baseline

                run_baseline.run(nested, fold, cfg.method.baseline.kind, below)
            else:
                from finsa.training import run as training_run  # imports torch

                training_run.run(nested, fold, below)
    records = files.json_lines(place / "predictions.jsonl")
    return np.array([[record["probs"][name] for name in data.labels.names] for record in records])


def _suspicious(rows: pl.DataFrame, found: label_noise.Confident, probs: Any, names: tuple[str, ...]) -> pl.DataFrame:
    """The suspicious rows, the most suspicious first, with given and likely label and their probabilities."""
    order = found.ranked
    chosen = rows[order.tolist()]
    return chosen.select("id", "split").with_columns(
        pl.Series("fingerprint", map(corrections.fingerprint, chosen["text"], chosen["target"]), dtype=pl.String),
        pl.Series("given", [names[label] for label in chosen["label"]], dtype=pl.String),
        pl.Series("likely", [names[label] for label in found.likely[order]], dtype=pl.String),
        pl.Series("given_probability", probs[order, chosen["label"].to_numpy()].round(4)),
        pl.Series("likely_probability", probs[order, found.likely[order]].round(4)),
        chosen["target"],
        chosen["text"],
    )


def _remarks(
    found: label_noise.Confident, ceiling: dict[str, Any], reached: float, shares: dict[str, float]
) -> list[str]:
    (low, high), ends = ceiling["intervals"]["noise"], ceiling["intervals"]["macro_f1"]
    by_split = ", ".join(f"{split} {percent(share, 1)}" for split, share in shares.items())
    sentences = [
        f"{int(found.suspicious.sum()):,} of {counted(int(found.given.sum()))} confidently have another label than the "
        f"given one ({by_split}). Estimated share of wrong labels: {percent(ceiling['noise'], 1)} "
        f"({percent(low, 1)} to {percent(high, 1)}).",
        f"If all of them are wrong, no method is expected to exceed macro-F1 {ceiling['macro_f1']:.3f} "
        f"({ends[0]:.3f} to {ends[1]:.3f}) on the test rows: that is what a perfect predictor of the true labels has.",
        "Confident errors of the models count as wrong labels, and the intervals do not contain this. Decide about "
        "some rows: the share that is really wrong selects the row of the table.",
    ]
    if reached > 1 - ceiling["noise"]:
        sentences.append(
            f"The models agree with {percent(reached, 1)} of the given labels, so the estimate is too high."
        )
    return sentences


def _ceiling_table(ceilings: dict[float, dict[str, Any]], held_out: int) -> Table:
    rows = []
    for wrong, ceiling in ceilings.items():
        cells = [
            f"{ceiling[name]:.3f} ({ceiling['intervals'][name][0]:.3f}-{ceiling['intervals'][name][1]:.3f})"
            for name in ("noise", "accuracy", "macro_f1")
        ]
        rows.append([percent(wrong), *cells])
    columns = ["suspicious labels that are wrong", "wrong labels", "accuracy", "macro-F1"]
    caption = (
        f"What a perfect predictor of the true labels has on {counted(held_out, 'test row')}, with 95 % intervals."
    )
    return Table("No method is expected to exceed", columns, rows, caption)


def _joint_table(joint: Any, found: label_noise.Confident, names: tuple[str, ...]) -> Table:
    rows = [
        [
            visible(name),
            f"{found.given[place]:,}",
            *(f"{cell:.1%}" for cell in joint[place] / max(joint[place].sum(), 1e-12)),
        ]
        for place, name in enumerate(names)
    ]
    columns = ["given label", "rows", *(f"→ {name}" for name in names)]
    caption = "→: estimated share of the rows with that given label whose true label it is (confident joint)."
    return Table("Estimated true labels", columns, rows, caption, optional=range(len(columns) - 1, 1, -1))


def _rows_table(rows: pl.DataFrame) -> Table:
    shown = [
        [
            visible(row["id"]),
            f"{row['given']} {row['given_probability']:.2f}",
            f"{row['likely']} {row['likely_probability']:.2f}",
            visible(row["text"][:60]),
        ]
        for row in rows.iter_rows(named=True)
    ]
    columns = ["row", "given", "likely", "text"]
    return Table("The most suspicious labels", columns, shown, words=("given", "likely", "text"))
