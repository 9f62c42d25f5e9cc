"""The committed sample is what its recipe generates."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import polars as pl

from finsa.config import Data, RunConfig
from finsa.data import dataset
from finsa.data.sources import generate
from finsa.stages.generate import FILE_OF_SPLIT, run

Configure = Callable[..., RunConfig]


def _small(config: Configure, **changes: object) -> Data:
    data = config("data=generated").data
    assert data.generator is not None
    return data.model_copy(update={"generator": data.generator.model_copy(update={"rows": 400, **changes})})


def test_the_sample_is_generated_by_its_recipe(config: Configure, project: Path) -> None:
    made = dataset.load(config("data=generated").data)
    for split, name in FILE_OF_SPLIT.items():
        committed = pl.read_csv(project / "data" / "sample" / name, infer_schema=False)
        names = [made.labels.names[number] for number in made.splits[split]["label"]]
        expected = made.splits[split].with_columns(pl.Series("label", names))
        assert committed.equals(expected.select("id", "text", "label", "domain"))


def test_the_recipe_contains_the_settings_and_the_fingerprint(config: Configure, project: Path) -> None:
    recipe = json.loads((project / "data" / "sample" / "recipe.json").read_text(encoding="utf-8"))
    data = config("data=generated").data
    assert data.generator is not None
    assert recipe["generator"] == data.generator.model_dump()
    assert recipe["split"] == data.split.model_dump()
    assert recipe["fingerprint"] == dataset.load(data).fingerprint
    assert recipe["command"] == "python run.py stage=generate data=generated output=<folder>"


def test_sample_read_from_its_files_is_the_same_table(config: Configure) -> None:
    sample, made = dataset.load(config().data), dataset.load(config("data=generated").data)
    assert sample.labels == made.labels
    assert sample.ledger.buckets == {"used": 4_800}
    for split, part in made.splits.items():
        assert sample.splits[split].equals(part)


def test_stage_writes_these_files(config: Configure, project: Path, tmp_path: Path) -> None:
    run(config("stage=generate", "data=generated", f"output={tmp_path}"))
    committed = project / "data" / "sample"
    assert {file.name for file in tmp_path.iterdir()} == {"train.csv", "valid.csv", "test.csv", "recipe.json"}
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (committed / file.name).read_bytes()


def test_generated_rows_have_ids_line_numbers_and_a_source(config: Configure) -> None:
    rows = generate(_small(config)).frame
    assert rows["_line"].to_list() == list(range(1, 401))
    assert rows.height == rows["id"].n_unique() == rows["text"].n_unique() == 400
    assert set(rows["file"]) == {"generator seed 7"}


def test_split_is_by_domain_and_label(config: Configure) -> None:
    rows = generate(_small(config)).frame
    counts = Counter(rows.select("domain", "label").iter_rows())
    held = Counter(rows.filter(pl.col("split") == "test").select("domain", "label").iter_rows())
    assert len(counts) == 6
    assert held == {stratum: max(1, int(0.125 * count)) for stratum, count in counts.items()}


def test_generator_settings_have_an_effect(config: Configure) -> None:
    def rows(**changes: object) -> pl.DataFrame:
        return generate(_small(config, **changes)).frame

    base = rows()
    assert base.equals(rows())
    assert set(base["text"]).isdisjoint(rows(seed=8)["text"])
    assert rows(rows=60).height == 60
    assert set(rows(domains={"forum": 1.0})["domain"]) == {"forum"}
    shares = {"news": {"利空": 1.0, "利好": 1.0}}
    only = rows(domains={"news": 1.0}, imbalance=shares, noise=0.0)
    assert Counter(only["label"]) == {"利空": 200, "利好": 200}
