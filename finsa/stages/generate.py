"""Write generated rows as CSV files, one per split."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl

from finsa.config import RunConfig
from finsa.data import dataset
from finsa.data.dataset_writer import FILE_OF_SPLIT
from finsa.runs import files
from finsa.runs.run_folder import Result
from finsa.session import Session


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Generate rows with the settings of ``data.generator``, and write them to ``output`` with a recipe."""
    session = session or Session()
    data = dataset.load(cfg.data, session)
    folder = Path(str(cfg.output)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    names = dict(enumerate(data.labels.names))
    assert cfg.data.generator is not None
    recipe = {
        "command": "python run.py stage=generate data=generated output=<folder>",
        "generator": cfg.data.generator.model_dump(),
        "split": cfg.data.split.model_dump(),
        "fingerprint": data.fingerprint,
    }
    for split, part in data.splits.items():
        written = part.with_columns(pl.col("label").replace_strict(names, return_dtype=pl.String))
        with files.replacing(folder / FILE_OF_SPLIT[split]) as place:
            columns = [name for name in ("id", "text", "label", "domain", "time") if written[name].null_count() == 0]
            written.select(columns).write_csv(place)
    files.write_text(folder / "recipe.json", json.dumps(recipe, ensure_ascii=False, indent=1) + "\n")
    rows = {split: part.height for split, part in data.splits.items()}
    print(f"wrote {rows} to {folder}")
    return Result("generate", None, {"rows": rows})
