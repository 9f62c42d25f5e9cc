from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from few import FEW

from finsa.config import RunConfig
from finsa.errors import ConfigError
from finsa.models import base, hardware
from finsa.session import Session
from finsa.stages import check

Compose = Callable[..., RunConfig]
# A plan runs every layer several times, and layers are equal, so that two show what all do.
LAYERS, SHALLOW = 2, ("model.architecture.num_hidden_layers=2", FEW)


@pytest.fixture(scope="module")
def session() -> Session:
    """Shared by plans of the same rows, as by the jobs of a sweep."""
    return Session()


def test_the_plan_of_the_published_ablation(config: Compose, capsys: pytest.CaptureFixture[str]) -> None:
    result = check.run(config("stage=check", "model=qwen05b", "method=lora"))
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())  # as if the table's cells were not wrapped
    assert "540,672 trainable of 494,573,440 total" in shown
    assert "train 3,608, validation 596, test 596" in shown
    assert "an estimate, because the model's is not on this machine" in shown
    assert result.metrics["trainable_parameters"] == 540_672
    assert result.run_dir is None


@pytest.mark.parametrize("model", ["qwen7b", "glm9b", "r1_distill_1_5b", "llama3_8b", "baichuan2_7b", "chatglm3_6b"])
def test_every_model_can_be_planned_offline(
    config: Compose, model: str, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("stage=check", f"model={model}", "method=lora")
    assert base.count_parameters(base.on_meta(config(*words).model))[1] > 1e9
    result = check.run(config(*words, *SHALLOW), session)
    assert result.metrics["total_parameters"] > 1e8
    assert result.metrics["memory_bytes"] > 2 * result.metrics["total_parameters"]
    assert "GiB" in capsys.readouterr().out


def test_a_plan_that_does_not_fit_says_so(
    config: Compose, session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config("stage=check", "method=lora", FEW)
    least = check.run(cfg, session).metrics["memory_bytes"]
    assert "does not fit" not in capsys.readouterr().out
    monkeypatch.setattr(hardware, "total_memory", lambda: least // 10)
    check.run(cfg, session)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert re.search(r"does not fit into the [\d.]+ GiB here, and no setting would make it fit \(the least is ", shown)


def test_the_plan_counts_what_training_will_do(config: Compose, capsys: pytest.CaptureFixture[str]) -> None:
    check.run(config("stage=check", "method=lora_downsample", "train.epochs=2", "train.batch_size=16"))
    smallest = 954
    steps = 2 * -(-3 * smallest // 16)
    assert f"{3 * smallest:,} rows, {steps:,} steps of 16 sequences" in capsys.readouterr().out


def test_nothing_is_written(config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check.run(config("stage=check", f"output_dir={tmp_path}"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "trainable"),
    [
        (("dora",), LAYERS * (22_528 + 896 + 128)),  # a magnitude per output of q_proj and v_proj
        (("pissa",), LAYERS * 22_528),
        (("qlora",), LAYERS * 183_296),
        (("lora_8bit",), LAYERS * 22_528),
        (("classifier_label_words",), LAYERS * 22_528 + 896 * 3 + 3),
        (("classifier", "method.learn=head", "method.adapter=null"), 896 * 3 + 3),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_every_learners_parameters_are_counted_without_weights(
    config: Compose, method: tuple[str, ...], trainable: int, session: Session
) -> None:
    words = ("stage=check", "model=qwen05b", f"method={method[0]}", *method[1:], *SHALLOW)
    metrics = check.run(config(*words), session).metrics
    assert metrics["trainable_parameters"] == trainable
    assert metrics["total_parameters"] == 494_032_768 - (24 - LAYERS) * 14_912_384 + trainable


def test_a_quantized_base_needs_less_memory(config: Compose, session: Session) -> None:
    words = ("stage=check", "model=glm9b", *SHALLOW)
    plans = [
        check.run(config(*words, f"method.quantization={kind}"), session).metrics["memory_plan"]
        for kind in ("none", "int8", "nf4")
    ]
    need = [made["training_bytes"]["weights"] for made in plans]
    weights = (9_400_279_040 - 2 * 151_552 * 4096) * LAYERS // 40  # but for embeddings and LM head
    width = need[0] - need[1] + weights  # bytes of all of them in the type of this machine
    assert width / weights == pytest.approx(round(width / weights), rel=1e-3)  # norms stay as they are
    assert round(width / weights) in (2, 4)
    assert need[1] - need[2] == pytest.approx(weights * (1 - 0.516), rel=1e-3)


EMBEDDED = ("model=tiny", "data=sample", "method=lora_response", "method.quantization=none", "train=default", FEW)


def test_a_chain_is_planned_link_by_link(config: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("experiment=finsa_moe", *EMBEDDED, "stage=check", "stage.links.joint.stage.warmup_steps=60")
    metrics = check.run(config(*words, f"output_dir={tmp_path}")).metrics
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    links = ["news: stage=train", "forum: stage=train", "joint: stage=moe_joint", "report: stage=report"]
    places = [shown.index(f"link {number} of 4, {link}") for number, link in enumerate(links, start=1)]
    assert places == sorted(places)
    assert list(metrics) == ["news", "forum", "joint"]
    one, other, both = (metrics[name]["trainable_parameters"] for name in metrics)
    assert one + other == both == 2 * (28_672 + 3 * 257)
    assert "steps of 16 sequences, after 60 of router and head" in shown
    assert "experts news, forum" in shown
    assert "trained first one adapter on all domains, to compare with" in shown
    assert shown.count(" GiB (") == 3
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "cache"])


def test_a_chain_whose_data_are_missing_is_planned_with_one_message_for_all_links(
    config: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("experiment=finsa_moe", *EMBEDDED[:1], *EMBEDDED[2:4])
    cfg = config(*words, "stage=check", f"data.parts.news.files={tmp_path / 'news'}")
    with pytest.raises(ConfigError) as caught:
        check.run(cfg)
    (problem,) = caught.value.problems
    assert problem.path == "data.parts.news.files"
    assert problem.text.startswith(f"no such file or folder: {tmp_path / 'news'}")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert shown.count("29,443 trainable of 3,769,347 total") == 3
    assert shown.count("rows missing, see below") == 3
    assert shown.count("memory about ") == 3
    assert "link 4 of 4, report: stage=report" in shown


def test_pre_training_is_planned_by_its_documents(config: Compose, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("data.corpus.documents=600", "data.corpus.block=64")
    check.run(config("experiment=tiny_base", "stage=check", *short))
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "documents 594 to train on, 6 held out" in shown
    assert "of 64 tokens (tokenizer: an estimate, because one of 6,144 entries is trained on the documents)" in shown
    assert "3,739,904 trainable of 3,739,904 total" in shown


def test_another_stage_ignores_the_stage_options_of_an_experiment(config: Compose) -> None:
    assert config("experiment=finsa_moe", "stage=inspect").stage == config("stage=inspect").stage
    with pytest.raises(ConfigError, match=r"stage\.links.*\[command line\]"):
        config("experiment=finsa_moe", "stage=inspect", "stage.links.news.seed=3")


def test_the_plan_says_which_difference_the_test_split_detects(
    config: Compose, trained: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("stage=check", "method=majority", "tracking=none", "stage.difference=0.02")
    check.run(config(*words))
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "detectable difference accuracy 0.0373, macro-F1 0.0363 on 596 test rows, with 80 % power" in shown
    assert re.search(r"test rows for a difference of 0\.02 accuracy 2,0\d\d, macro-F1 2,0\d\d ", shown)
    runs = [trained("majority"), trained("tfidf_lr")]
    predicted = [json.loads((run / "metrics.json").read_text(encoding="utf-8"))["test"]["accuracy"] for run in runs]
    check.run(config(*words, FEW, f"runs=[{runs[0]},{runs[1]}]"))
    assert f"(accuracy {min(predicted):.3f}, methods disagree on " in " ".join(
        capsys.readouterr().out.replace("│", " ").split()
    )
    with pytest.raises(ConfigError, match="stage=check compares two runs on the same test rows"):
        check.run(config(*words, FEW, f"runs={runs[0]}"))
    with pytest.raises(
        ConfigError, match="more than twice the share of rows that are correct, or wrong, is impossible"
    ):
        config("stage=check", "stage.accuracy=0.95", "stage.disagreement=0.2")
