"""The benchmarks run with equal settings: a short pass on the embedded model."""

from __future__ import annotations

import json
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import commands
import pytest
from few import FEW
from transformers import AutoTokenizer

from benchmarks import bench
from finsa.config import ROOT, compose
from finsa.data import dataset, tokenized
from finsa.models import tokenizers


def test_the_training_benchmark_compares_equal_settings() -> None:
    words = ["--quick", "--rows", "2", "--batch", "2", "--turns", "1"]
    done = commands.run(*words, script="benchmarks/training_step.py")
    assert done.returncode == 0, done.stderr
    equal = re.search(
        r"loss ([\d.]+) \(trl ([\d.]+)\), gradients differ by ([\d.e-]+)",
        " ".join(re.sub("│", " ", done.stdout).split()),
    )
    assert equal is not None, done.stdout
    assert abs(float(equal[1]) - float(equal[2])) < 1e-4
    assert float(equal[3]) < 1e-5
    assert len(re.findall(r"samples/s", done.stdout)) == 14


def test_the_mixture_benchmark_runs_all_settings() -> None:
    done = commands.run("--quick", "--turns", "1", "--batch", "2", "--tokens", "24", script="benchmarks/mixture.py")
    assert done.returncode == 0, done.stderr
    told = " ".join(re.sub("│", " ", done.stdout).split())  # cells wrap
    assert len(re.findall(r"as fast as published", told)) == 12


def test_an_epoch_is_compared_with_stock_trainers() -> None:
    done = commands.run("--quick", FEW, script="benchmarks/epoch.py")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"turn 1: (.+): \[\(([\d.]+), ([\d.]+)\)\]", done.stdout)
    assert [name for name, _, _ in found] == ["transformers Trainer", "trl SFTTrainer, completion only", "finsa"]
    assert all(float(seconds) > 0 and 0 < float(score) <= 1 for _, seconds, score in found)


def test_the_cost_curves_have_every_axis() -> None:
    done = commands.run("--quick", script="benchmarks/curves.py")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"[\d.]+ ms", done.stdout)) == 8
    shown = " ".join(done.stdout.split())
    assert all(f"a step over {axis}" in shown for axis in ("prompt tokens", "rows", "classes", "experts"))


def test_a_micro_batch_is_timed_in_every_way() -> None:
    """The script ends with an error if losses differ."""
    done = commands.run("--quick", script="benchmarks/lines.py")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"│ (\w[\w ,]+?) +│ +[\d.]+ s +([\d.]+)x", done.stdout)
    alone = ["side by side", "one line"]
    assert [arm for arm, _ in found] == [*alone, *alone, "prefix once, side by side", "prefix once, one line"]
    assert all(float(ratio) > 0 for _, ratio in found)


def test_the_table_and_the_chart_come_from_the_results(tmp_path: Path) -> None:
    rows = bench.rows(bench.RESULTS)
    assert {"training_step (qwen05b)", "inference (qwen05b)", "data_pipeline"} <= {row.benchmark for row in rows}
    assert all(row.equal and row.value for row in rows)
    bench.draw(rows, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"


def test_every_benchmark_is_run_by_the_one_command() -> None:
    scripts = {file.stem for file in (ROOT / "benchmarks").glob("*.py")}
    assert set(bench.WORDS) == scripts - {
        "bench",
        "drawn",
        "gpu",
        "int8",
        "kept",
        "peer_arms",
        "peer_trainers",
        "peers",
        "predict",
        "real",
        "stock",
    }
    assert set(bench.READERS) == set(bench.WORDS) - {"report", "serving"}


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/peers.py, which imports its neighbors as a script does."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("peers")


def test_every_peer_is_given_the_settings_of_finsa(peers: Any, tmp_path: Path) -> None:
    arms, trainers = import_module("peer_arms"), import_module("peer_trainers")
    cfg = peers.composed(tmp_path / "model", tmp_path, tmp_path, 640, 240)
    settings = arms.settings_of(cfg, 640, tmp_path)
    assert (settings.steps, settings.warmup_steps, settings.targets) == (40, 4, ["q_proj", "v_proj"])
    schedule = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 16,
        "learning_rate": cfg.train.learning_rate,
        "lr_scheduler_type": cfg.train.schedule,
        "warmup_steps": 4,
        "weight_decay": cfg.train.weight_decay,
        "max_grad_norm": cfg.train.max_grad_norm,
        "seed": cfg.seed,
    }
    adapter = {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.1}
    factory = arms.llamafactory(settings, tmp_path, {}, True)
    assert {**schedule, **adapter, "lora_target": "q_proj,v_proj", "bf16": False}.items() <= factory.items()
    swift = arms.swift(settings, tmp_path, {}, True)
    expected = {**schedule, **adapter, "target_modules": ["q_proj", "v_proj"], "torch_dtype": "float32"}
    assert expected == {key: swift[key] for key in expected}
    assert schedule.items() <= trainers.shared(vars(settings), tmp_path).items()
    lora = trainers.lora(vars(settings))
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (8, 16, 0.1, {"q_proj", "v_proj"})
    words = arms.finsa(settings, tmp_path, {}, True)
    ours = compose.build(*compose.compose_values(words), words)
    changed = {"warmup": 4, "threads": 1}
    assert ours.train == cfg.train.model_copy(update=changed)
    assert ours.method.adapter == cfg.method.adapter.model_copy(update={"targets": ("q_proj", "v_proj")})
    assert (ours.data.prompt, ours.data.max_length, ours.seed) == (cfg.data.prompt, cfg.data.max_length, cfg.seed)


CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_prompts_of_peers_are_compared_token_by_token(peers: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "model")
    shutil.copy(ROOT / "data" / "tiny" / "config.json", tmp_path / "model")
    labels = ["negative", "neutral", "positive"] * 20
    for split in ("train", "valid", "test"):
        rows = [{"text": f"$A{n} {split} plan: 收益 +5%…", "label": label} for n, label in enumerate(labels)]
        peers.write_lines(tmp_path / "rows" / f"{split}.jsonl", rows)
    cfg = peers.composed(tmp_path / "model", tmp_path / "rows", tmp_path, 30, 12)
    job = tokenized.build(cfg, dataset.load(cfg.data), tokenizers.load_tokenizer(cfg.model))
    settings, _ = peers.prepare(cfg, job, tmp_path / "data")
    chats = {split: json.loads((tmp_path / "data" / f"{split}.json").read_text()) for split in ("train", "test")}
    assert chats["test"][0][0] == {"role": "system", "content": "You help."}
    for peer, behind in (("transformers", ""), ("trl", "\n")):
        encode = import_module("peer_trainers").RENDERERS[peer](vars(settings))
        found = peers.compare_tokens(job, {split: list(map(encode, rows)) for split, rows in chats.items()})
        equal = {"rows": 42, "equal_prompts": 42, "equal_answers": 42, "learned_behind_the_end_token": [behind]}
        assert found == equal
    chats["test"][0][0]["content"] += " "
    found = peers.compare_tokens(job, {split: list(map(encode, rows)) for split, rows in chats.items()})
    assert (found["rows"], found["equal_prompts"]) == (42, 41)


@pytest.mark.parametrize(
    ("answer", "exact", "first_word"),
    [
        ("positive", 2, 2),
        (" positive\n", 2, 2),
        ("Positive.", None, 2),
        ("neutral neutral", None, 1),
        ("The sentiment is negative", None, None),
        ("positively", None, None),
        ("", None, None),
    ],
)
def test_answers_of_peers_are_parsed_by_two_rules(
    peers: Any, answer: str, exact: int | None, first_word: int | None
) -> None:
    words = ("negative", "neutral", "positive")
    assert (peers.exact(answer, words), peers.first_word(answer, words)) == (exact, first_word)


def test_a_failing_peer_is_reported_with_the_reason(peers: Any, tmp_path: Path) -> None:
    command = ["python", "-c", "raise SystemExit('no wheel for this machine')"]
    with pytest.raises(peers.FailedError) as caught:
        peers.spend(command, tmp_path / "log")
    assert str(caught.value) == "python ended with exit code 1: no wheel for this machine"
    spent = peers.spend(["bash", "-c", "python -c 'sum(range(10**7))'; true"], tmp_path / "log")
    assert spent["cpu_seconds"] > 0.05  # of the child's child
    assert peers.needs("peft<=0.18.1,>=0.18.0", ("torchaudio",))
    left_out = ("torchaudio>=2.4.0", "torch>=2.4.0", 'vllm>=0.4; extra == "vllm"')
    assert not any(peers.needs(requirement, ("torchaudio",)) for requirement in left_out)


def test_the_peers_that_were_measured_had_equal_prompts_and_steps() -> None:
    report = json.loads((bench.RESULTS / "peers.json").read_text(encoding="utf-8"))
    measured = {name: arm for name, arm in report["arms"].items() if "not_run" not in arm}
    assert {"finsa", "trl_best", "llamafactory_shipped"} <= set(measured)
    for name, arm in measured.items():
        if "exact" in arm:
            assert arm["trainer"]["steps"] == report["settings"]["steps"], name
        if name != "finsa":
            rows = report["rows"]["train"] + report["rows"]["test"]
            assert arm["tokens"]["rows"] == arm["tokens"]["equal_prompts"] == arm["tokens"]["equal_answers"] == rows


def test_a_step_on_pairs_is_compared_with_trl() -> None:
    done = commands.run("--quick", script="benchmarks/preferences.py")
    assert done.returncode == 0, done.stderr
    times = [float(found) for found in re.findall(r"│ ([\d.]+)\s+│\n", done.stdout)[:3]]
    assert times[2] == 1.0
    assert all(value > 1 for value in times[:2])  # two and four readings of the prompts instead of one
    assert "norm of the exact gradient" in done.stdout
