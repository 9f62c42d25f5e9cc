"""The main job on real weights: SmolLM2-135M-Instruct as converted by `make weights`, and a few rows.

One training run serves all tests, in float32 on a CPU. The bounds on perplexity are wide around what the original
weights give; everything else is an equality of two ways to compute the same thing.
"""

from __future__ import annotations

import csv
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import torch

from finsa.baselines import encoder
from finsa.config import LinearProbe, RunConfig
from finsa.data.labels import LabelSpace
from finsa.data.prompts import Prompt
from finsa.data.rows import Renderer
from finsa.inference import predictor
from finsa.inference.label_tree import scored_answers
from finsa.inference.scoring import scorer
from finsa.stages import export, predict, train

Compose = Callable[..., RunConfig]
pytestmark = pytest.mark.real_model

SENTENCE = (
    "Photosynthesis is the process by which plants use sunlight, water and carbon dioxide to create oxygen and energy "
    "in the form of sugar."
)
# What llama.cpp 0.5.0 computes from the same GGUF files, their matrices dequantized to float32: the mean negative
# log-likelihood per token (with and without <|im_start|> before the text), and the log-probabilities of likely tokens.
DIGITS = "Profit rose 12.5% to $3,200 million in 2015, the company's CFO said."
LIKELIHOODS = {
    SENTENCE + " It takes place in the chloroplasts, which contain chlorophyll.": (2.722832, 2.060953),
    DIGITS: (3.240338, 3.033302),
}
QUESTION = (
    "<|im_start|>user\nIs this news good or bad for the share price? Sales doubled.<|im_end|>\n<|im_start|>assistant\n"
)
ANSWERS = {1348: -1.0809, 504: -1.5802, 10539: -2.8650, 49: -3.2110, 5230: -3.7239}  # This, The, Yes, A, No
GEMMA = {
    "公司发布公告称，2024年净利润同比增长12.5%，超出市场预期，股价大涨。": 3.026965,
    "The central bank left its policy rate unchanged on Thursday. " * 60: 0.098236,  # longer than the sliding window
}
PAIRS = (
    ("The company's net profit rose by a third.", "公司净利润增长三分之一。"),
    ("The central bank cut its interest rate.", "央行下调利率。"),
    ("The airline canceled all flights after the storm.", "风暴过后，航空公司取消了所有航班。"),
    ("The football match ended in a draw.", "足球比赛以平局结束。"),
)
PROMPT = "Is this news positive, neutral or negative for the share price?\n{text}"
LABELS = ("negative", "neutral", "positive")
SUBJECTS = ("The airline", "A chip maker", "The retailer", "Its main bank", "The miner", "A paper mill")
HAPPENED = {
    "negative": ("warns that profit will fall sharply", "cuts its outlook after heavy losses"),
    "neutral": ("will hold its annual meeting in May", "appoints a new head of accounting"),
    "positive": ("raises its dividend after record profit", "wins a large order and lifts its forecast"),
}
TEXTS = {  # by label, in the subjects' order
    label: [f"{subject} {happened[number % 2]}." for number, subject in enumerate(SUBJECTS)]
    for label, happened in HAPPENED.items()
}
SPLITS = {"train": (0, 4), "validation": (4, 5), "test": (5, 6)}
STEPS = 4


@pytest.fixture(scope="module")
def words(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides of a run that takes seconds: four steps of three rows, validated after two and four."""
    folder = tmp_path_factory.mktemp("rows")
    for split, (start, stop) in SPLITS.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["text", "label"])
            writer.writerows((TEXTS[label][number], label) for number in range(start, stop) for label in LABELS)
    return (
        *("model=smollm2_135m", f"model.path={smollm2}", "model.dtype=float32", "method=lora_response"),
        *(
            "data=table",
            f"data.files={folder}",
            f"data.prompt='{PROMPT}'",
            "data.max_length=96",
            "data.columns.id=null",
        ),
        *("train=smoke", f"train.max_steps={STEPS}", "train.batch_size=3", "train.validate_every=2"),
        *("train.learning_rate=2e-3", "train.schedule=constant", "train.warmup=0"),
        *("train.threads=1", "tracking=none", "stage.compare_base=false"),
    )


@pytest.fixture(scope="module")
def finished(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run in a separate process, so that its peak memory is not that of others."""
    base = tmp_path_factory.mktemp("whole")
    done = commands.run(*words, f"output_dir={base}")
    assert done.returncode == 0, done.stderr
    (folder,) = (file.parent for file in base.glob("*/run.json"))
    return folder


def records(run: Path, name: str = "predictions") -> list[dict[str, Any]]:
    """The lines of a file of a run."""
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def network(smollm2: Path) -> Any:
    """The model and its tokenizer, as transformers loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(smollm2)


@torch.no_grad()
def label_log_probs(model: Any, prompt: list[int], answers: list[tuple[int, ...]]) -> list[float]:
    """One plain forward per label: no shared prefix, no tree, no batch."""
    found = []
    for answer in answers:
        log_probs = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        found.append(sum(float(log_probs[len(prompt) - 1 + n, token]) for n, token in enumerate(answer)))
    return found


def test_english_is_likely_and_the_same_words_reversed_are_not(network: Any) -> None:
    model, tokenizer = network

    @torch.no_grad()
    def perplexity(text: str) -> float:
        ids = tokenizer(f"<|endoftext|>{text}", return_tensors="pt")["input_ids"]
        return math.exp(float(model(ids, labels=ids).loss))

    assert 4 < perplexity(SENTENCE) < 7
    assert perplexity(" ".join(reversed(SENTENCE.split()))) > 200


@torch.no_grad()
def test_the_conversion_computes_what_llama_cpp_computes(network: Any) -> None:
    """Rotary halves, norms, the tied head and the tokenizer: measured, the largest difference of a logit is 1e-4."""
    model, tokenizer = network
    assert len(LIKELIHOODS) == 2
    for text, likelihoods in LIKELIHOODS.items():
        for start, wanted in zip(("<|im_start|>", ""), likelihoods, strict=True):
            ids = tokenizer(start + text, return_tensors="pt")["input_ids"]
            assert float(model(ids, labels=ids).loss) == pytest.approx(wanted, abs=4e-5)
    ids = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    likely = model(ids).logits[0, -1].log_softmax(-1).topk(len(ANSWERS))
    assert dict(zip(likely.indices.tolist(), likely.values.tolist(), strict=True)) == pytest.approx(ANSWERS, abs=1e-3)


def test_the_tokenizer_restores_every_text_and_splits_digits(network: Any) -> None:
    _, tokenizer = network
    for text in (SENTENCE, "  EUR 21.1mn\tin 2007,\n\nup 9.7 %: https://a.b/c?d=1 ", "“quotes” éàü 中国股市上涨3% 😀"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("EUR 21.1mn in 2007")["input_ids"])
    assert tokenizer(DIGITS)["input_ids"][:10] == [2954, 5494, 8739, 216, 33, 34, 30, 37, 21, 288]  # as llama.cpp
    assert pieces == ["E", "UR", "Ġ", "2", "1", ".", "1", "mn", "Ġin", "Ġ", "2", "0", "0", "7"]


def test_prompt_tokens_are_those_of_the_chat_template(network: Any) -> None:
    _, tokenizer = network
    labels = LabelSpace(LABELS, LABELS)
    renderer = Renderer(tokenizer, Prompt.of(PROMPT, labels, "chat", "none", tokenizer), labels, 96)
    texts = [text for texts in TEXTS.values() for text in texts]
    for text, prompt in zip(texts, renderer.encode(texts), strict=True):
        turns = [{"role": "user", "content": PROMPT.format(text=text)}]
        assert prompt == tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        turns.append({"role": "assistant", "content": "neutral"})
        row = renderer.row(prompt, 1, "response")["input_ids"]
        assert [*row, *tokenizer("\n")["input_ids"]] == tokenizer.apply_chat_template(turns)["input_ids"]


def test_labels_are_scored_as_one_plain_forward_per_label_scores_them(network: Any) -> None:
    model, tokenizer = network
    words = ("negative", "positive", "strongly negative", "strongly positive", "neutral")  # two of them branch
    labels = LabelSpace(words, words)
    renderer = Renderer(tokenizer, Prompt.of(PROMPT, labels, "chat", "none", tokenizer), labels, 96)
    prompts = renderer.encode([TEXTS["negative"][0], TEXTS["positive"][1]])
    answers, _ = scored_answers(renderer)
    wanted = [label_log_probs(model, prompt, answers) for prompt in prompts]
    assert scorer(model, renderer, 4096).score(prompts) == pytest.approx(np.array(wanted), abs=2e-4)


def test_training_lowers_the_loss_and_the_adapter_answers_as_the_run_did(
    finished: Path, config: Compose, tmp_path: Path
) -> None:
    losses = [line["loss"] for line in records(finished, "log") if "loss" in line]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] / 2
    wanted, output = records(finished), tmp_path / "answers.csv"
    (tmp_path / "texts.txt").write_text("\n".join(record["text"] for record in wanted), encoding="utf-8")
    words = ("stage=predict", f"run={finished}", f"input={tmp_path / 'texts.txt'}", f"output={output}")
    predict.run(config(*words, "train.threads=1"))
    answers = predictor.restore(str(finished), 4096)([record["text"] for record in wanted])
    with output.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for number, (record, row) in enumerate(zip(wanted, rows, strict=True)):
        assert list(record["log_probs"].values()) == pytest.approx(answers.log_probs[number], abs=1e-4)
        shares = [float(row[f"p_{label}"]) for label in LABELS]
        assert shares == pytest.approx(list(record["probs"].values()), abs=1e-5)


def test_a_run_that_was_killed_ends_with_the_adapter_of_one_that_was_not(
    words: tuple[str, ...], finished: Path, config: Compose, tmp_path: Path
) -> None:
    process = commands.Command(*words, f"output_dir={tmp_path}")
    until = time.monotonic() + 600
    while process.poll() is None and not list(tmp_path.glob("*/checkpoints/checkpoint-2/*")):
        assert time.monotonic() < until, process.err
        time.sleep(0.05)
    process.signal(signal.SIGKILL)
    process.wait()
    (folder,) = (file.parent for file in tmp_path.glob("*/run.json"))
    assert not (folder / "metrics.json").exists(), "it was done before it could be killed"
    resumed = train.run(config(*words, f"output_dir={tmp_path}", "resume=true"))
    assert resumed.run_dir == folder
    for name in ("adapters/default/adapter_model.safetensors", "predictions.jsonl"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name


def test_a_merged_export_is_an_ordinary_model_that_scores_as_the_run(
    finished: Path, config: Compose, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export.run(
        config("stage=export", f"run={finished}", "format=merged", f"output={tmp_path / 'merged'}", "stage.timed=1")
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    answers = [tuple(tokenizer(label, add_special_tokens=False)["input_ids"]) for label in LABELS]
    for record in records(finished):
        turns = [{"role": "user", "content": PROMPT.format(text=record["text"])}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert list(record["log_probs"].values()) == pytest.approx(label_log_probs(model, prompt, answers), abs=5e-4)


def test_the_planned_memory_is_close_to_what_the_run_took(finished: Path) -> None:
    """Measured: 1.42 GiB; planned: 1.81, for larger scoring batches than its few rows fill, and 1.57 for a step."""
    facts = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    planned = max(facts["memory_plan"][part]["total"] for part in ("training_bytes", "scoring_bytes"))
    assert planned / 2 < facts["peak_memory_bytes"] < 1.1 * planned


@torch.no_grad()
def test_gemma_computes_what_llama_cpp_computes(gemma3: Path) -> None:
    """Measured, the largest difference of a logit is 0.06; llama.cpp rounds GELU to half precision."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gemma3, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(gemma3)
    assert len(GEMMA) == 2
    for text, wanted in GEMMA.items():
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert ids[0, 0] == tokenizer.bos_token_id
        assert float(model(ids, labels=ids).loss) == pytest.approx(wanted, abs=1e-3)


def test_sentences_are_closest_to_their_translations(e5_small: Path, config: Compose) -> None:
    words = ("method=linear_probe", f"method.baseline.path={e5_small}", "data=table", "data.files=none.csv")
    cfg = config(*words)
    assert isinstance(cfg.method.baseline, LinearProbe)
    probe = encoder.LinearProbe(cfg.method.baseline, cfg, 2)
    probe.start([])
    english, chinese = (probe.features([pair[side] for pair in PAIRS]) for side in (0, 1))
    assert (english @ chinese.T).argmax(axis=1).tolist() == [0, 1, 2, 3]
