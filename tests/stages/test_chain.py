"""Chains of stages: a link's configuration, links that are skipped, and both published chains, shortened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from finsa.config import ROOT, RunConfig
from finsa.data import dataset
from finsa.errors import ConfigError
from finsa.models.moe import experts
from finsa.runs import run_folder
from finsa.session import Session
from finsa.stages import chain, pretrain, train
from finsa.synthetic import generator
from finsa.training import expert_runs

Compose = Callable[..., RunConfig]
SHORT = ("train=smoke", "train.batch_size=4", "tracking=none", "train.max_steps=2", "data.cache=null")
PAIR = "stage.links={one: {stage: train, data: {domain: news}}, two: {stage: train, data: {domain: forum}, seed: 7}}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for name, rows in (("train", 60), ("valid", 24), ("test", 24)):
        pl.read_csv(ROOT / "data" / "sample" / f"{name}.csv").head(rows).write_csv(folder / f"{name}.csv")
    return folder


def ran(place: Path) -> list[tuple[str, str]]:
    """Stage and status of every run below a folder, in the order in which they were started."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in place.rglob("run.json")]
    return [(facts["stage"], facts["status"]) for facts in sorted(found, key=lambda facts: facts["started"])]


def test_a_link_is_the_ordinary_run_of_its_command(config: Compose, tmp_path: Path) -> None:
    cfg = config("stage=chain", PAIR, "method=qlora", "train.epochs=3", f"output_dir={tmp_path}")
    plain = config("method=qlora", "train.epochs=3", "data.domain=forum", "seed=7", f"output_dir={tmp_path}")
    assert chain.configure(cfg, "two", {}, Session()) == plain
    links = "stage.links={a: {stage: {name: moe_joint, warmup_steps: 7, experts: {x: '@b', y: null}}, train: pretrain}}"
    cfg = config("stage=chain", links, "model=qwen05b")
    link = chain.configure(cfg, "a", {"b": "/some/folder"}, Session())
    plain = config(
        "stage=moe_joint",
        "stage.warmup_steps=7",
        "stage.experts={x: /some/folder, y: null}",
        "train=pretrain",
        "model=qwen05b",
    )
    assert link == plain


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ("{}", r"stage\.links: names no stage"),
        ("{a: {data: sample}}", r"stage\.links\.a: names no stage"),
        ("{a: {stage: trian}}", r"stage\.links\.a\.stage: there is no 'trian'\. Did you mean 'train'"),
        ("{a: {stage: export}}", r"stage\.links\.a\.stage: export cannot be a link of a chain. Choose from: train"),
        ("{a: {stage: train}, b: {stage: train, train: {epoch: 1}}}", r"stage\.links\.b\.train\.epoch: unknown key"),
        ("{a: {stage: train}, b: {stage: report, runs: ['@c']}}", r"stage\.links\.b: @c is not an earlier link"),
    ],
)
def test_wrong_links_are_reported_before_the_first_runs(
    config: Compose, tmp_path: Path, links: str, message: str
) -> None:
    cfg = config("stage=chain", f"stage.links={links}", f"output_dir={tmp_path}")
    with pytest.raises(ConfigError, match=message):
        chain.run(cfg)
    assert ran(tmp_path) == []


def test_finsa_moe_runs_shortened_and_resumes_after_a_stop(
    config: Compose, files: Path, shallow: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = ("experiment=finsa_moe", "model=tiny", "data=sample", "method=lora_response", "method.quantization=none")
    words = (*embedded, *shallow, *SHORT, "stage.links.joint.stage.warmup_steps=2", f"data.files={files}")
    cfg = config(*words, f"output_dir={tmp_path}")
    real = train.run

    def breaks(link: RunConfig, session: Session) -> Any:
        if link.data.domain == "forum":
            raise KeyboardInterrupt
        return real(link, session)

    with monkeypatch.context() as patched:
        patched.setattr(train, "run", breaks)
        with pytest.raises(KeyboardInterrupt):
            chain.run(cfg)
    assert ran(tmp_path) == [("train", "complete")]

    first = chain.run(cfg)
    runs = ran(tmp_path)
    assert sorted(runs) == [("moe_joint", "complete"), *[("train", "complete")] * 3]
    assert {record["arm"] for record in first.metrics["mixture"]} >= {"mixture", "union", "news alone"}
    assert first.run_dir is not None
    assert run_folder.read(str(first.run_dir))[1].stage.name == "moe_joint"

    # As the message of an interrupted command advises; stages that cannot be resumed, such as a report, simply run.
    (report,) = tmp_path.rglob("report.html")
    assert report.parent.parent == tmp_path
    report.unlink()
    again = chain.run(config(*words, f"output_dir={tmp_path}", "resume=true", "reuse_outdated=true"))
    assert ran(tmp_path) == runs
    assert (again.run_dir, again.metrics, again.objective) == (first.run_dir, first.metrics, first.objective)
    assert [file.parent.parent for file in tmp_path.rglob("report.html")] == [tmp_path]


def test_finteam_experts_runs_shortened(config: Compose, files: Path, shallow: tuple[str, ...], tmp_path: Path) -> None:
    few = {"corpus": {"documents": 60, "block": 32}}
    short = [f"stage.links.{role}.data={{name: roles_{role}, corpus: {few['corpus']}}}" for role in ("macro", "micro")]
    short.append(f"stage.links.quant.data={{name: roles_quant, corpus: {few['corpus']}}}")
    short = [text.replace("'", "") for text in short]
    further = ("stage.links.joint.stage.warmup_steps=2", f"data.files={files}", f"output_dir={tmp_path}")
    cfg = config("experiment=finteam_experts", *shallow, *SHORT, *short, *further)
    result = chain.run(cfg)
    assert sorted(stage for stage, _ in ran(tmp_path)) == ["moe_joint", "pretrain", "pretrain", "pretrain", "train"]
    assert result.metrics["router"]["experts"] == ["macro", "micro", "quant"]
    assert result.metrics["router"]["accuracy"] is None
    assert [record["arm"] for record in result.metrics["mixture"]][2:] == [
        "macro alone",
        "micro alone",
        "quant alone",
        "union",
    ]
    again = chain.run(cfg)
    assert again.metrics == result.metrics
    assert len(ran(tmp_path)) == 5


def test_pre_training_an_adapter_yields_an_expert(config: Compose, shallow: tuple[str, ...], tmp_path: Path) -> None:
    short = ("data.corpus.documents=60", "data.corpus.block=32", "train.select_by=loss", f"output_dir={tmp_path}")
    cfg = config(*SHORT, *shallow, "stage=pretrain", "data=roles_quant", *short)
    result = pretrain.run(cfg)
    assert result.run_dir is not None
    assert not (result.run_dir / "model").exists()
    place = result.run_dir / "adapters" / "default"
    (found, _) = experts.read({"a": place, "b": place})
    assert len(found.weights()) == 4
    assert result.metrics["parameters"] == 14_336


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (("data=roles_quant",), "train.select_by: documents have no macro_f1"),
        (("data=roles_quant", "method=zero_shot"), "not lm with learn=nothing"),
        (("data=tiny_corpus", "train.select_by=loss"), "a new tokenizer needs a new model: set method=full"),
        (("data=roles_quant", "train.select_by=loss", "output=x"), "an adapter stays in its run folder"),
    ],
)
def test_invalid_pre_training_settings_are_refused(config: Compose, further: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pretrain.run(config("stage=pretrain", "tracking=none", *further))


def test_roles_divide_the_documents() -> None:
    found = {role: generator.corpus(40, 3, role=role) for role in ("macro", "micro", "quant")}
    assert {role: len(documents) for role, documents in found.items()} == dict.fromkeys(found, 40)
    assert len({document for documents in found.values() for document in documents}) == 120
    assert generator.role_of("医药板块成交56.2亿元") == "macro"
    assert generator.role_of("净利润55.3亿") == "quant"
    assert generator.role_of("公司攻克关键技术") == "micro"


def test_the_mixture_uses_the_experts_of_the_chain(config: Compose, files: Path, tmp_path: Path) -> None:
    """The links of a chain and stage=moe_joint refer to the same runs."""
    links = "stage.links={a: {stage: train, data: {domain: news}}}"
    cfg = config(*SHORT, "stage=chain", links, f"data.files={files}", f"output_dir={tmp_path}")
    link = chain.configure(cfg, "a", {}, Session())
    joined = config(*SHORT, "stage=moe_joint", f"data.files={files}", f"output_dir={tmp_path}")
    wanted = expert_runs.expert_config(joined, "news")
    assert run_folder.config_hash(link) == run_folder.config_hash(wanted)
    assert dataset.load(link.data).fingerprint == dataset.load(wanted.data).fingerprint


def test_english_sentiment_ends_in_one_table(config: Compose, tmp_path: Path, files: Path) -> None:
    """The whole experiment on a baseline: NWGI is scored by the run on TFNS, with the map of its seven levels."""
    few = {"利空": "negative", "中性": "neutral", "利好": "positive"}
    seven = {**few, "利空": "strong negative", "中性": "mildly positive"}
    for data in ("fpb", "fiqa", "tfns", "nwgi"):
        for number, split in enumerate(("train", "valid", "test") if data != "nwgi" else ("test",)):
            rows = pl.read_csv(files / f"{split}.csv").select("id", "text", "label").slice(number * (data == "fpb"))
            named = rows.with_columns(pl.col("label").replace(seven if data == "nwgi" else few))
            (tmp_path / data).mkdir(exist_ok=True)
            named.write_csv(tmp_path / data / f"{split}.csv")
    extra = {"tfns": "label_map: null", "nwgi": "columns: {text: text}"}
    links = [
        f"stage.links.{data}.data={{name: {data}, files: {tmp_path / data}, "
        f"{extra.get(data, 'columns: {label: label}')}}}"
        for data in ("fpb", "fiqa", "tfns", "nwgi")
    ]
    words = ("method=tfidf_lr", "tracking=none", "models=null", f"output_dir={tmp_path / 'runs'}")
    done = chain.run(config("experiment=english_sentiment", *words, *links))
    assert ran(tmp_path / "runs") == [("train", "complete")] * 3 + [("evaluate", "complete")]
    (csv,) = (tmp_path / "runs").glob("report_*/report.csv")
    row = pl.read_csv(csv).row(
        by_predicate=(pl.col("system") == "tfidf_lr") & (pl.col("measure") == "accuracy"), named=True
    )
    # NWGI has the texts of TFNS here, and the mildly positive rows are neutral.
    assert row["nwgi"] == row["tfns"]
    assert row["nwgi_n"] == 24
    assert done.run_dir is not None
    assert json.loads((done.run_dir / "run.json").read_text(encoding="utf-8"))["data"] == "nwgi"
