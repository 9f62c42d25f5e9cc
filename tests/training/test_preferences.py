"""Pairs of labels: where they come from, which rows are used, and what training on them starts from."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from trained import SHORT

from finsa.config import RunConfig
from finsa.data import dataset, tokenized
from finsa.errors import ConfigError, DataError
from finsa.inference.scoring import scorer
from finsa.models import base, factory, tokenizers
from finsa.runs import starts
from finsa.session import Session
from finsa.stages import export, train
from finsa.synthetic import generator
from finsa.training import fit

Configure = Callable[..., RunConfig]
Tuned = Callable[..., Path]
LABELS = ("利空", "中性", "利好")
TWO = "method.preference.folds=2"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 training rows, with a wrong label each, and 32 held-out rows per split."""
    folder, frame = tmp_path_factory.mktemp("rows"), generator.generate(224, 1)
    wrong = pl.col("label").replace_strict({"利空": "中性", "中性": "利好", "利好": "利空"}).alias("worse")
    for split, (first, count) in {"train": (0, 160), "valid": (160, 32), "test": (192, 32)}.items():
        frame.select("id", "text", "label", "domain", wrong).slice(first, count).write_csv(folder / f"{split}.csv")
    return folder


@pytest.fixture(scope="module")
def start(config: Configure, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned run, which makes mistakes."""
    words = ("method=lora_response", f"data.files={rows}", *SHORT[1:], "train.max_steps=20", "train.epochs=3")
    done = train.run(config(*words, f"output_dir={tmp_path_factory.mktemp('start')}"))
    assert done.run_dir is not None
    return done.run_dir


@dataclass(frozen=True)
class Found:
    """A run of DPO, the prompts that each of its fits was trained on, and the session that has the scores."""

    folder: Path
    fits: list[set[tuple[int, ...]]]
    session: Session


def tune(config: Configure, rows: Path, start: Path | str, folder: Path, *words: str, session: Session) -> Path:
    """Train for two steps from a run, without dropout."""
    common = (f"data.files={rows}", *SHORT[1:], "train.max_steps=2", "train.log_every=1", "method.adapter.dropout=0")
    done = train.run(config(*common, f"method.init={start}", f"output_dir={folder}", *words), session)
    assert done.run_dir is not None
    return done.run_dir


@pytest.fixture(scope="module")
def found(config: Configure, rows: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    fits, real, session = list[set[tuple[int, ...]]](), fit.fit, Session()

    def watched(**given: Any) -> Any:
        fits.append({tuple(row["input_ids"]) for row in given["rows"]})
        return real(**given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "fit", watched)
        words = ("method=dpo", TWO)
        folder = tune(config, rows, start, tmp_path_factory.mktemp("dpo"), *words, session=session)
    return Found(folder, fits, session)


@pytest.fixture
def tuned(config: Configure, rows: Path, tmp_path: Path, found: Found) -> Tuned:
    """Train from a run, in the session of `found`."""
    return lambda start, *words: tune(config, rows, start, tmp_path, *words, session=found.session)


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def pairs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [record["loss"] for record in records if "loss" in record]


def tokens_of(cfg: RunConfig) -> tokenized.TokenizedDataset:
    return tokenized.build(cfg, dataset.load(cfg.data), tokenizers.load_tokenizer(cfg.model))


def test_wrong_labels_come_from_models_that_were_not_trained_on_the_row(
    config: Configure, rows: Path, found: Found
) -> None:
    folder, fits, session = found.folder, found.fits, found.session
    cfg = config("method=lora_response", f"data.files={rows}", *SHORT[1:])
    data = tokens_of(cfg)
    whole = {tuple(row["input_ids"]) for row in data.training_rows(cfg)}
    first, second, _ = fits
    assert first | second == whole  # each part is left out once
    assert not first & second
    assert abs(len(first) - len(second)) <= 0.2 * len(whole)

    (scores,) = (value for key, value in session.start_scores.items() if key[-1] == 2)
    gold = data.gold("train")
    for row, pair in enumerate(pairs(folder)):
        assert pair["id"] == data.dataset.splits["train"]["id"][row]
        assert pair["chosen"] == LABELS[gold[row]]
        others = [label for label in range(3) if label != gold[row]]
        assert pair["rejected"] == LABELS[max(others, key=lambda label: scores[row, label])]
        assert pair["mistake"] == (int(scores[row].argmax()) != gold[row])
    noted = facts(folder)["pairs"]
    assert noted["mistakes"] == sum(pair["mistake"] for pair in pairs(folder))
    assert 0 < noted["mistakes"] < noted["rows"] == len(gold)
    assert noted["share_of_mistakes"] == round(noted["mistakes"] / noted["rows"], 4)
    assert not (folder / "folds").exists()
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert f"160, {noted['mistakes']} of them mistakes" in page
    assert "(lora_response)" in page


def test_jobs_with_the_same_start_share_its_scores(found: Found, tuned: Tuned, start: Path) -> None:
    kept = dict(found.session.start_scores)
    second = tuned(start, "method=ipo", TWO)
    assert found.session.start_scores.keys() == kept.keys()
    assert all(found.session.start_scores[key] is kept[key] for key in kept)
    assert pairs(second) == pairs(found.folder)


def test_jobs_with_other_prompts_or_settings_share_no_scores(config: Configure, found: Found, tuned: Tuned) -> None:
    words = ("method=dpo", "data.columns.rejected=worse", "train.learning_rate=1e-9")
    for prompt in ("文本：{text}\n情感分类：", "请判断：{text}\n答案："):
        folder = tuned("base", *words, f"data.prompt='{prompt}'")
        assert losses(folder) == pytest.approx([math.log(2)] * 2, abs=1e-4)


def test_folds_are_trained_again_where_another_checkpoint_is_the_best(found: Found, tuned: Tuned, start: Path) -> None:
    before = set(found.session.start_scores)
    tuned(start, "method=orpo", TWO, "train.select_by=loss")
    assert len(set(found.session.start_scores) - before) == 1


@pytest.mark.parametrize("method", ["dpo", "kto", "simpo", "orpo"])
def test_training_begins_at_the_starting_model(method: str, tuned: Tuned, start: Path) -> None:
    """Before the first update the model is the reference: -log sigmoid(0) for DPO, 1 - sigmoid(0) for KTO."""
    words = ("data.columns.rejected=worse", "train.learning_rate=1e-9")
    folder = tuned(start, f"method={method}", *words)
    if method in ("dpo", "kto"):
        wanted = math.log(2) if method == "dpo" else 0.5
        assert losses(folder) == pytest.approx([wanted, wanted], abs=1e-4)
    ours, theirs = (json.loads((path / "metrics.json").read_text("utf-8"))["test"] for path in (folder, start))
    assert ours["confusion"] == theirs["confusion"]


def test_only_mistakes_are_used_where_the_method_says_so(tuned: Tuned, start: Path) -> None:
    words = ("method=dpo", TWO, "method.preference.mistakes_only=true")
    folder = tuned(start, *words, "train.batch_size=4", "train.micro_batch_size=4")
    assert all(pair["used"] == pair["mistake"] for pair in pairs(folder))
    assert facts(folder)["pairs"]["rows"] == facts(folder)["pairs"]["mistakes"]
    with pytest.raises(DataError, match=r"makes \d+ mistakes in \d+ rows, fewer than a step has"):
        tuned(start, *words, "train.batch_size=160", "train.micro_batch_size=4")


def test_without_a_run_the_base_model_finds_the_pairs(config: Configure, rows: Path, tuned: Tuned) -> None:
    folder = tuned("base", "method=simpo")
    cfg = config("method=lora_response", f"data.files={rows}", *SHORT[1:])
    data = tokens_of(cfg)
    backbone = base.load_base(cfg.model, cfg.seed, "none")
    scores = scorer(backbone, data.renderer, 4096).score(data.prompts("train"))
    predicted = [LABELS[label] for label in scores.argmax(axis=1)]
    for pair, label in zip(pairs(folder), predicted, strict=True):
        assert pair["rejected" if pair["mistake"] else "chosen"] == label
    assert facts(folder)["pairs"]["source"] == "scores of the base model"


def test_pairs_are_read_from_a_column(tuned: Tuned, start: Path) -> None:
    folder = tuned(start, "method=dpo", "data.columns.rejected=worse")
    found = {(pair["chosen"], pair["rejected"]) for pair in pairs(folder)}
    assert found == {("利空", "中性"), ("中性", "利好"), ("利好", "利空")}
    assert not any("mistake" in pair for pair in pairs(folder))
    assert losses(folder)[0] == pytest.approx(math.log(2), abs=1e-4)


def test_the_expected_reward_is_the_loss(config: Configure, rows: Path, tuned: Tuned, start: Path) -> None:
    """Minus the mean probability of the true labels, at a rate at which nothing moves; with costs, the mean cost."""
    cfg = config("method=lora_response", f"data.files={rows}", *SHORT[1:])
    data = tokens_of(cfg)
    model = factory.restore(
        cfg, base.load_base(cfg.model, cfg.seed, "none"), start / "adapters" / "default", data.renderer
    )
    log_probs = scorer(model, data.renderer, 4096).score(data.prompts("train"))
    probs = [[math.exp(one - max(row)) for one in row] for row in log_probs.tolist()]
    probs = [[one / sum(row) for one in row] for row in probs]
    gold, costs = data.gold("train"), [[0, 1, 3], [1, 0, 1], [2, 1, 0]]
    words = ("train.learning_rate=1e-9", "train.batch_size=160", "train.micro_batch_size=32", "train.epochs=1")
    assert len(gold) == 160
    folder = tuned(start, "method=expected_reward", *words)
    assert losses(folder)[0] == pytest.approx(-sum(probs[row][gold[row]] for row in range(160)) / 160, abs=1e-4)
    words = (*words, "method.reward.kind=costs", f"evaluation.costs={costs}", "evaluation.metrics=[mcc]")
    folder = tuned(start, "method=expected_reward", *words)
    mean = sum(probs[row][label] * costs[gold[row]][label] for row in range(160) for label in range(3)) / 160
    assert losses(folder)[0] == pytest.approx(mean, abs=1e-4)

    test = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["test"]
    confusion = test["confusion"]
    counts = Counter({(true, found): confusion[true][found] for true in range(3) for found in range(3)})
    wanted = sum(costs[true][found] * count for (true, found), count in counts.items()) / counts.total()
    assert test["measures"]["cost"] == pytest.approx(wanted)
    low, high = test["intervals"]["cost"]
    assert low < wanted < high
    assert test["measures"]["least_cost"] <= max(high, wanted + 0.2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("method=dpo",), "set method.init=<a finished run>, or method.init=base"),
        (("method=expected_reward",), "or method.reward.beta=0"),
        (("method=expected_reward", "method.init=base", "method.reward.kind=costs"), "needs evaluation.costs"),
        (("method=dpo", "method.init=base", "method.loss_on=response"), "set method.loss_on=label"),
        (("method=dpo", "method.init=base", "method.loss.name=focal"), "takes the place of method.loss"),
        (("method=dpo", "method.init=base", "method.reward={kind: accuracy, beta: 0.0}"), "are two objectives"),
        (("method=zero_shot", "method.init=somewhere"), "is trained further as an adapter"),
        (("train.select_by=cost",), "needs evaluation.costs"),
        (("evaluation.costs=[[0,1],[1]]",), "needs a row per true label"),
        (("evaluation.costs=[[0,1],[1,2]]",), "the true label must cost 0"),
        (("evaluation.costs=[[0,0],[0,0]]",), "no error costs anything"),
        (("method=dpo", "method.init=''"), "init is empty"),
        (("stage=moe_joint", "method=dpo", "method.init=base", "data=finnf_joint"), "is for stage=train"),
    ],
)
def test_a_method_without_what_it_needs_is_refused(words: tuple[str, ...], message: str, config: Configure) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*words)


def test_costs_for_other_labels_are_refused(config: Configure) -> None:
    with pytest.raises(ConfigError, match="has 2 rows, and there are 3 labels"):
        train.run(config(*SHORT, "evaluation.costs=[[0,1],[1,0]]"))


def test_a_run_that_started_from_a_run_gives_no_new_mistakes(config: Configure, tuned: Tuned, start: Path) -> None:
    again = tuned(start, "method=lora_label")
    assert starts.resolved(config("method=dpo", *SHORT, f"method.init={again}"), None).method.init == str(again)
    with pytest.raises(ConfigError, match="cannot be found by training it again"):
        tuned(again, "method=dpo")
    tuned(again, "method=expected_reward")  # needs none


def test_models_that_were_trained_on_the_rows_find_no_mistakes(
    config: Configure, rows: Path, start: Path, tuned: Tuned, tmp_path: Path
) -> None:
    """An adapter that started from another one, and an export as the base model."""
    adapted = tmp_path / "adapted"
    shutil.copytree(start, adapted)
    text = (adapted / "config.yaml").read_text("utf-8").replace("\n    init: null\n", f"\n    init: {start}\n")
    (adapted / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="started from a trained adapter itself"):
        tuned(adapted, "method=dpo", TWO)
    merged = tmp_path / "merged"
    export.run(config("stage=export", f"run={start}", "format=merged", f"output={merged}"))
    cfg = ("method=dpo", f"model.path={merged}", "model.name=tuned")
    with pytest.raises(ConfigError, match=f"{merged}, which the scores would come from, was trained on 160 of the 160"):
        tuned("base", *cfg)
    tuned("base", *cfg, "data.columns.rejected=worse")  # pairs of one's own need no scores
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(rows / "test.csv", other / "train.csv")
    shutil.copy(rows / "valid.csv", other / "valid.csv")
    pl.read_csv(rows / "train.csv").head(20).write_csv(other / "test.csv")
    words = (f"data.files={other}", *SHORT[1:], f"model.path={merged}", f"output_dir={tmp_path / 'out'}")
    with pytest.raises(ConfigError, match="20 of the 20 test texts are training or validation rows"):
        train.run(config("method=lora_response", *words))
