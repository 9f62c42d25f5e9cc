from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from folders import answers, write_run

from finsa.config import RunConfig
from finsa.errors import RunError
from finsa.evaluation import finished_runs
from finsa.evaluation.finished_runs import RunGroup

GOLD = np.arange(90) % 3
Configure = Callable[..., RunConfig]


def grouped(*paths: Path) -> tuple[list[RunGroup], list[str]]:
    return finished_runs.group(finished_runs.load(paths)[0])


def test_runs_that_differ_only_in_the_seed_are_one_group(config: Configure, tmp_path: Path) -> None:
    for seed in (3, 1, 2):
        cfg = config("method=lora", f"seed={seed}", f"output_dir=elsewhere{seed}")
        write_run(tmp_path / f"a{seed}", cfg, GOLD, answers(GOLD, 0.5, seed))
    write_run(tmp_path / "b", config("method=lora_response"), GOLD, answers(GOLD, 0.5, 4))
    found, notes = grouped(*finished_runs.find_folders(str(tmp_path)))
    assert [(group.name, group.seeds) for group in found] == [("lora", [1, 2, 3]), ("lora_response", [42])]
    assert notes == []


def test_groups_are_named_by_the_settings_that_differ(config: Configure, tmp_path: Path) -> None:
    commands = [
        ["method=lora", "train.learning_rate=0.001"],
        ["method=lora", "train.learning_rate=0.002"],
        ["method=lora_response", "train.learning_rate=0.002"],
        ["method=lora_response", "model=qwen05b", "train.learning_rate=0.002"],
    ]
    paths = [
        write_run(tmp_path / str(n), config(*words), GOLD, answers(GOLD, 0.5, n)) for n, words in enumerate(commands)
    ]
    assert [group.name for group in grouped(*paths)[0]] == [
        "lora tiny train.learning_rate=0.001",
        "lora tiny train.learning_rate=0.002",
        "lora_response tiny",
        "lora_response qwen05b",
    ]


def test_a_model_is_named_where_runs_with_several_models_use_it(config: Configure, tmp_path: Path) -> None:
    def names(*commands: str) -> list[str]:
        folders = [tmp_path / str(len(commands)) / command.replace(" ", "_") for command in commands]
        for folder, command in zip(folders, commands, strict=True):
            write_run(folder, config(*command.split()), GOLD, answers(GOLD, 0.5, 1))
        return [group.name for group in grouped(*folders)[0]]

    assert names("method=lora model=qwen05b", "method=tfidf_lr") == ["lora", "tfidf_lr"]
    assert names("method=lora", "method=lora model=qwen05b", "method=majority") == [
        "lora tiny",
        "lora qwen05b",
        "majority",
    ]
    several = ["method=lora", "method=tfidf_lr", "method=tfidf_lr model=qwen05b", "method=zero_shot"]
    assert names(*several) == ["lora", "tfidf_lr tiny", "tfidf_lr qwen05b", "zero_shot"]


def test_runs_that_started_from_runs_are_grouped_by_the_methods_of_these(config: Configure, tmp_path: Path) -> None:
    """Each seed starts from a run of its own; another starting method is another configuration."""
    folders = []
    for seed, method in ((1, "lora_response"), (2, "lora_response"), (3, "lora")):
        start = str(tmp_path / f"start{seed}")
        words = ("method=dpo", f"seed={seed}", f"method.init={start}", f"method.adapter.init={start}/adapters/default")
        facts = {"start": {"run": start, "method": method, "seed": seed}}
        folders.append(write_run(tmp_path / f"dpo{seed}", config(*words), GOLD, answers(GOLD, 0.5, seed), **facts))
    found = grouped(*folders)[0]
    assert [(group.name, group.seeds) for group in found] == [
        ("dpo method.init=lora_response", [1, 2]),
        ("dpo method.init=lora", [3]),
    ]
    costs = "evaluation.costs=[[0,1],[1,0]]"
    plain = [write_run(tmp_path / "a", config("method=lora"), GOLD, answers(GOLD, 0.5, 1))]
    plain.append(write_run(tmp_path / "b", config("method=lora", "seed=2", costs), GOLD, answers(GOLD, 0.5, 2)))
    assert [group.name for group in grouped(*plain)[0]] == ["lora"]  # a measure makes no other configuration


def test_a_cost_matrix_is_shown_only_where_groups_differ_in_it(config: Configure, tmp_path: Path) -> None:
    def names(**rewards: str) -> list[str]:
        run = {"method=expected_reward", "method.init=base"}
        paths = [
            write_run(tmp_path / name, config(*run, *words.split(" ")), GOLD, answers(GOLD, 0.5, number))
            for number, (name, words) in enumerate(rewards.items())
        ]
        return [group.name for group in grouped(*paths)[0]]

    costs, other = (f"method.reward.kind=costs evaluation.costs=[[0,{n}],[1,0]]" for n in (1, 2))
    kinds = ["expected_reward method.reward.kind=accuracy", "expected_reward method.reward.kind=costs"]
    assert names(a="method.reward.kind=accuracy", b=costs) == kinds
    matrices = [f"expected_reward evaluation.costs=[[0.0, {n}.0], [1.0, 0.0]]" for n in (1, 2)]
    assert names(c=costs, d=other) == matrices


def test_the_name_of_a_data_set_stands_for_its_prompt(config: Configure, tmp_path: Path) -> None:
    prompts = {"one": "data.prompt='{text}：'", "other": "data.prompt='文本：{text}\n情感：'"}
    paths = [
        write_run(tmp_path / name, config("method=lora", f"data.name={name}", prompt), GOLD, answers(GOLD, 0.5, 1))
        for name, prompt in prompts.items()
    ]
    groups, notes = grouped(*paths)
    assert ([group.name for group in groups], notes) == (["lora data.name=one", "lora data.name=other"], [])


def test_differences_that_names_do_not_show_are_noted(config: Configure, tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", config("method=lora", "train.epochs=2"), GOLD, answers(GOLD, 0.5, 1))
    other = write_run(tmp_path / "b", config("method=lora_response", "train.epochs=3"), GOLD, answers(GOLD, 0.5, 2))
    assert grouped(first, other)[1] == [
        "Besides what their names show, the configurations differ in train.epochs (2.0, 3.0)."
    ]


def test_training_settings_are_ignored_for_methods_without_training(config: Configure, tmp_path: Path) -> None:
    paths = [write_run(tmp_path / str(n), config("method=zero_shot", f"train.epochs={n}"), GOLD, GOLD) for n in (1, 2)]
    found, notes = grouped(*paths)
    assert [(group.name, len(group.runs)) for group in found] == [("zero_shot", 1)]
    assert notes == [f"1 copies of {paths[0]} (same seed and predictions) count once."]


def test_an_evaluation_is_grouped_with_the_run_it_scored(config: Configure, tmp_path: Path) -> None:
    trained = write_run(tmp_path / "trained", config("method=lora"), GOLD, answers(GOLD, 0.5, 1))
    again = write_run(
        tmp_path / "again", config("stage=evaluate"), GOLD, answers(GOLD, 0.5, 2), stage="evaluate", run=str(trained)
    )
    bare = write_run(
        tmp_path / "bare", config("stage=evaluate"), GOLD, answers(GOLD, 0.5, 3), stage="evaluate", run="None"
    )
    found, _ = grouped(trained, again, bare)
    assert [(group.name, len(group.runs)) for group in found] == [("lora", 2), ("zero_shot", 1)]
    shutil.rmtree(trained)
    with pytest.raises(RunError, match="which no longer exists"):
        finished_runs.load([again])


def test_runs_of_other_labels_are_refused(config: Configure, tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", config("method=lora"), GOLD, GOLD)
    other = write_run(tmp_path / "b", config("method=lora"), GOLD, GOLD, ("negative", "neutral", "positive"))
    with pytest.raises(RunError) as caught:
        finished_runs.comparable(finished_runs.load([first, other])[0], "any")
    assert f"{first} and {other} cannot be compared in one report" in str(caught.value)
    assert "labels: 利空, 中性, 利好 against negative, neutral, positive" in str(caught.value)


def test_runs_of_other_test_rows_are_refused(config: Configure, tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", config("method=lora"), GOLD, GOLD)
    other = write_run(tmp_path / "b", config("method=lora", "data=generated"), GOLD[:60], GOLD[:60])
    with pytest.raises(RunError) as caught:
        finished_runs.comparable(finished_runs.load([first, other])[0], "any")
    assert (
        "test rows: data=sample data.files=data/sample (90 rows) against data=generated data.files=null (60 rows, 60 "
        "of them the same). Report them separately, or score them on the same rows with stage=evaluate"
    ) in str(caught.value)


def test_rows_of_one_data_set_are_distinguished_by_the_differing_key(config: Configure, tmp_path: Path) -> None:
    """As with the experts of a mixture: both have data=sample with the same files."""
    first = write_run(tmp_path / "a", config("method=lora", "data.domain=news"), GOLD, GOLD)
    other = write_run(tmp_path / "b", config("method=lora", "data.domain=forum"), GOLD[:60], GOLD[:60])
    with pytest.raises(RunError) as caught:
        finished_runs.comparable(finished_runs.load([first, other])[0], "any")
    assert (
        "test rows: data=sample data.domain=news (90 rows) against data=sample data.domain=forum (60 rows, 60 of them "
        "the same)"
    ) in str(caught.value)


def test_the_comparable_runs_of_a_folder_are_selected(config: Configure, tmp_path: Path) -> None:
    """A mixture's folder: the mixture and the union share their test rows, each expert has those of its domain."""
    union = write_run(tmp_path / "0", config("method=lora"), GOLD, answers(GOLD, 0.5, 1))
    news = write_run(tmp_path / "1", config("method=lora", "data.domain=news"), GOLD[:50], GOLD[:50])
    forum = write_run(tmp_path / "2", config("method=lora", "data.domain=forum"), GOLD[:40], GOLD[:40])
    mixture = write_run(tmp_path / "3", config("stage=moe_joint"), GOLD, answers(GOLD, 0.6, 2))
    runs = finished_runs.load(finished_runs.find_folders(str(tmp_path)))[0]
    kept, reasons = finished_runs.comparable(runs, "same")
    assert [run.path for run in kept] == [union, mixture]
    assert reasons == {
        str(news): "other test rows: data=sample data.domain=null (90 rows) against data=sample data.domain=news (50 "
        "rows, 50 of them the same)",
        str(forum): "other test rows: data=sample data.domain=null (90 rows) against data=sample data.domain=forum (40 "
        "rows, 40 of them the same)",
    }
    with pytest.raises(RunError, match="cannot be compared in one report"):  # each was asked for
        finished_runs.comparable(runs, "same", named=[union, news, mixture])


def test_of_two_groups_of_equal_size_none_is_preferred(config: Configure, tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / f"{name}{method}", config(f"method={method}", f"data.domain={name}"), GOLD[:n], GOLD[:n])
        for name, n in (("news", 50), ("forum", 40))
        for method in ("lora", "zero_shot")
    ]
    with pytest.raises(RunError) as caught:
        finished_runs.comparable(finished_runs.load(paths)[0], "same")
    sets = [f"runs=[{paths[at]},{paths[at + 1]}]" for at in (0, 2)]
    assert f"Report {sets[0]} or {sets[1]}, or score them on the same rows with stage=evaluate" in str(caught.value)


def test_runs_of_other_training_rows_are_refused_unless_the_user_wants_them(config: Configure, tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", config("method=lora"), GOLD, GOLD)
    other = write_run(tmp_path / "b", config("method=lora"), GOLD, GOLD, data_fingerprint="beef")
    runs = finished_runs.load([first, other])[0]
    with pytest.raises(
        RunError, match=r"rows: .* f00d \(90 .*\) against .* beef \(90 .* stage\.training_rows=any compares them"
    ):
        finished_runs.comparable(runs, "same")
    finished_runs.comparable(runs, "any")


def test_the_same_rows_in_another_place_are_the_same(config: Configure, tmp_path: Path) -> None:
    paths = [
        write_run(
            tmp_path / str(n), config("method=lora", f"data.files=place{n}", f"seed={n}"), GOLD, answers(GOLD, 0.5, n)
        )
        for n in (1, 2)
    ]
    runs = finished_runs.load(paths)[0]
    finished_runs.comparable(runs, "same")
    assert len(finished_runs.group(runs)[0]) == 1


def test_unfinished_and_unscored_runs_are_skipped_with_the_reason(config: Configure, tmp_path: Path) -> None:
    good = write_run(tmp_path / "0", config("method=lora"), GOLD, GOLD)
    failed = write_run(tmp_path / "1", config("method=lora"), GOLD, GOLD, status="failed", error="RunError: no room")
    pretrained = write_run(tmp_path / "2", config("method=lora"), GOLD, GOLD, stage="pretrain")
    (pretrained / "metrics.json").write_text("{}", encoding="utf-8")
    found, left_out = finished_runs.load(finished_runs.find_folders(str(tmp_path)))
    assert [run.path for run in found] == [good]
    assert left_out == {
        str(failed): "failed: RunError: no room",
        str(pretrained): "has no test scores (stage=pretrain)",
    }
    with pytest.raises(RunError, match="no finished run with test scores.*no room"):
        finished_runs.load([failed])


def test_run_folders_are_found_recursively_in_job_order(config: Configure, tmp_path: Path) -> None:
    for number in (0, 1, 2, 10):
        write_run(tmp_path / "sweeps" / str(number), config("method=lora"), GOLD, GOLD)
    found = finished_runs.find_folders(str(tmp_path))
    assert [path.name for path in found] == ["0", "1", "2", "10"]
    assert finished_runs.find_folders([str(tmp_path / "sweeps" / "10"), str(tmp_path)])[0].name == "10"
    with pytest.raises(RunError, match="there is no run folder at or below"):
        finished_runs.find_folders(str(tmp_path / "nowhere"))


def test_damaged_files_are_named(config: Configure, tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", config("method=lora"), GOLD, GOLD)
    lines = (path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    (path / "predictions.jsonl").write_text(lines[0].replace("利空", "看跌"), encoding="utf-8")
    with pytest.raises(RunError, match=r"predictions\.jsonl does not fit metrics\.json: '看跌' is missing"):
        finished_runs.load([path])
    (path / "predictions.jsonl").write_text(lines[0][:20], encoding="utf-8")
    with pytest.raises(RunError, match=r"predictions\.jsonl is damaged"):
        finished_runs.load([path])


def test_a_run_of_an_older_version_can_be_read(config: Configure, tmp_path: Path) -> None:
    """Keys added since are unset, which is their default."""
    new = write_run(tmp_path / "new", config("method=lora", "seed=1"), GOLD, answers(GOLD, 0.5, 1))
    old = write_run(tmp_path / "old", config("method=lora", "seed=2"), GOLD, answers(GOLD, 0.5, 2))
    values = yaml.safe_load((old / "config.yaml").read_text(encoding="utf-8"))
    for key in ("runs", "published"):
        del values[key]
    del values["method"]["rows_per_class"]
    (old / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    found, _ = grouped(new, old)
    assert [(group.name, group.seeds) for group in found] == [("lora", [1, 2])]
    assert found[0].runs[1].ledger["splits"]["test"] == dict.fromkeys(("利空", "中性", "利好"), 30)
    assert json.loads((old / "run.json").read_text(encoding="utf-8"))["status"] == "complete"
