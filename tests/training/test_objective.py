"""The loss over labels uses exactly the scores of the scorer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from base_models import small
from torch.nn import functional

from finsa.config import RunConfig
from finsa.data.labels import LabelSpace
from finsa.data.prompts import Prompt
from finsa.data.rows import Renderer
from finsa.inference import scoring
from finsa.models.classifier import Classifier
from finsa.training import objective
from finsa.training.batches import Collator

Configure = Callable[..., RunConfig]
TEXTS = ["净利润同比增长三成", "跌停", "公司召开董事会会议，审议通过三项议案", "减持"]
GOLD = [2, 0, 1, 0]
WORDS = {
    "first tokens differ": ("利空", "中性", "利好"),
    "one token each": ("A", "B", "C"),
    "shared beginnings": ("看涨", "看跌", "看"),  # the last begins the others
}


def renderer(tokenizer: Any, words: tuple[str, ...]) -> Renderer:
    return Renderer(tokenizer, Prompt("文本：", "\n情感分类："), LabelSpace(words, words), 64)


def model_for(tokenizer: Any) -> Any:
    return small(vocabulary=len(tokenizer))


def batch(made: Renderer, head: str, goal: objective.Objective) -> dict[str, torch.Tensor]:
    prompts = made.encode(TEXTS)
    if head == "classifier":
        rows = [made.text_row(prompt, gold) for prompt, gold in zip(prompts, GOLD, strict=True)]
    else:
        rows = [made.row(prompt, gold, "label") for prompt, gold in zip(prompts, GOLD, strict=True)]
    return Collator(0, goal.suffix)([dict(row) for row in rows])


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS.keys())
def test_loss_on_the_label_equals_that_of_the_scores(
    config: Configure, qwen_tokenizer: Any, words: tuple[str, ...]
) -> None:
    made, model = renderer(qwen_tokenizer, words), model_for(qwen_tokenizer)
    goal = objective.build(config("method=lora_label").method, made, [1, 1, 1])
    scores = torch.from_numpy(scoring.scorer(model, made, 1000)(TEXTS))
    expected = functional.cross_entropy(scores, torch.tensor(GOLD), reduction="sum")
    assert goal.total(model, batch(made, "lm", goal)).item() == pytest.approx(float(expected), rel=1e-5)


def test_the_answers_of_the_test_differ_in_length_and_prefix(qwen_tokenizer: Any) -> None:
    lengths = {
        name: [len(answer) for answer in renderer(qwen_tokenizer, words).answers] for name, words in WORDS.items()
    }
    assert lengths["one token each"] == [1, 1, 1]
    assert sorted(lengths["first tokens differ"]) == [1, 2, 2]
    first = [answer[0] for answer in renderer(qwen_tokenizer, WORDS["shared beginnings"]).answers]
    assert len(set(first)) < 3


def test_loss_on_the_label_reaches_every_layer_through_the_tree(config: Configure, qwen_tokenizer: Any) -> None:
    made, model = renderer(qwen_tokenizer, WORDS["shared beginnings"]), model_for(qwen_tokenizer).requires_grad_(True)
    goal = objective.build(config("method=lora_label").method, made, [1, 1, 1])
    goal.total(model, batch(made, "lm", goal)).backward()
    gradients = [parameter.grad for parameter in model.model.layers.parameters()]
    assert gradients
    assert all(gradient is not None and float(gradient.abs().sum()) > 0 for gradient in gradients)


def test_a_classifiers_loss_is_that_of_its_scorer(config: Configure, qwen_tokenizer: Any) -> None:
    made = renderer(qwen_tokenizer, WORDS["one token each"])
    model = Classifier(model_for(qwen_tokenizer), 3, dropout=0.5, seed=1).eval()
    goal = objective.build(config("method=classifier").method, made, [1, 1, 1])
    scored = scoring.scorer(model, made, 40)(TEXTS)
    np.testing.assert_allclose(np.exp(scored).sum(axis=1), 1, atol=1e-6)
    expected = -scored[np.arange(4), GOLD].sum()
    assert float(goal.total(model, batch(made, "classifier", goal)).detach()) == pytest.approx(expected, rel=1e-5)


def test_tokens_after_the_text_do_not_affect_a_classifier(config: Configure, qwen_tokenizer: Any) -> None:
    made = renderer(qwen_tokenizer, WORDS["one token each"])
    model = Classifier(model_for(qwen_tokenizer), 3, dropout=0.0, seed=1).eval()
    (prompt,) = made.encode(TEXTS[:1])
    span = torch.tensor([[len(made.prefix), len(prompt) - len(made.suffix)]])
    with torch.no_grad():
        whole = model(torch.tensor([prompt]), span)
        short = model(torch.tensor([made.until_text_end(prompt)]), span)
    torch.testing.assert_close(whole, short, rtol=1e-5, atol=1e-6)


def test_logit_adjustment_applies_only_in_training(config: Configure, qwen_tokenizer: Any) -> None:
    made, model = renderer(qwen_tokenizer, WORDS["one token each"]), model_for(qwen_tokenizer)
    goal = objective.build(config("method=lora_logit_adjustment").method, made, [10, 1, 4])
    scores = torch.from_numpy(scoring.scorer(model, made, 1000)(TEXTS))
    shares = torch.tensor([10, 1, 4]).double() / 15
    expected = functional.cross_entropy(scores + shares.log(), torch.tensor(GOLD), reduction="sum")
    assert goal.total(model, batch(made, "lm", goal)).item() == pytest.approx(float(expected), rel=1e-5)


# ------------------------------------------------------------------------------------------------ numbers and sets


def of_values(made: Renderer, goal: objective.Objective, values: list[list[float]]) -> dict[str, torch.Tensor]:
    rows = [dict(made.row(prompt, 0, "label")) for prompt in made.encode(TEXTS)]
    return Collator(0, goal.suffix)([{**row, "values": value} for row, value in zip(rows, values, strict=True)])


def test_each_label_is_a_question_of_its_own(config: Configure, qwen_tokenizer: Any) -> None:
    labels = LabelSpace(("价格", "风险"), ("价格", "风险"), "multi_label", ("{label}：是", "{label}：否"))
    prompt, values = Prompt("文本：", "\n涉及"), [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]]
    made, model = Renderer(qwen_tokenizer, prompt, labels, 64), model_for(qwen_tokenizer)
    goal = objective.build(config("method=lora_label").method, made, [1, 1])
    odds = []
    for name in labels.words:  # one question at a time, each with its own prompt
        alone = Renderer(qwen_tokenizer, prompt, LabelSpace(("y", "n"), (f"{name}：是", f"{name}：否")), 64)
        log_probs = scoring.LabelScorer(model, alone, 1000)(TEXTS)
        odds.append(log_probs[:, 0] - log_probs[:, 1])
    together = scoring.scorer(model, made, 1000)(TEXTS)
    np.testing.assert_allclose(together, np.stack(odds, axis=1), atol=1e-4)
    expected = functional.binary_cross_entropy_with_logits(
        torch.from_numpy(together), torch.tensor(values, dtype=torch.float64), reduction="none"
    )
    total = goal.total(model, of_values(made, goal, values))
    assert total.item() == pytest.approx(float(expected.mean(dim=1).sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("number", "target"),
    [(-1, [1, 0, 0]), (-0.25, [0.25, 0.75, 0]), (0, [0, 1, 0]), (1.5, [0, 0.25, 0.75]), (2, [0, 0, 1])],
)
def test_a_number_divides_its_weight_between_two_anchors(number: float, target: list[float]) -> None:
    anchors = (-1.0, 0.0, 2.0)
    target = list(map(float, target))
    assert np.dot(target, anchors) == pytest.approx(number)
    scores = torch.tensor([[0.3, -1.0, 0.7]], requires_grad=True)
    loss = objective.anchor_loss(anchors)(scores, torch.tensor([[number]]).float())
    log_p = scores.detach().log_softmax(1)[0]
    assert loss.item() == pytest.approx(-float(torch.tensor(target) @ log_p), rel=1e-6)
    loss.sum().backward()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad[0], log_p.exp() - torch.tensor(target))


def test_the_loss_of_anchors_reads_the_scores_of_the_scorer(config: Configure, qwen_tokenizer: Any) -> None:
    labels = LabelSpace(("-1", "0", "1"), ("利空", "中性", "利好"), "regression")
    made, model = Renderer(qwen_tokenizer, Prompt("文本：", "\n情感："), labels, 64), model_for(qwen_tokenizer)
    goal = objective.build(config("method=lora_label").method, made, [1, 1, 1])
    values = torch.tensor([[0.2], [-1.0], [0.9], [0.0]])
    scores = torch.from_numpy(scoring.scorer(model, made, 1000)(TEXTS)).float()
    expected = objective.anchor_loss(labels.numbers)(scores, values).sum()
    assert goal.total(model, of_values(made, goal, values.tolist())).item() == pytest.approx(float(expected), rel=1e-5)


def test_a_regression_head_has_one_output_and_hubers_loss(config: Configure, qwen_tokenizer: Any) -> None:
    labels = LabelSpace(("-1", "0", "1"), ("利空", "中性", "利好"), "regression")
    made = Renderer(qwen_tokenizer, Prompt("文本：", "\n情感："), labels, 64)
    model = Classifier(model_for(qwen_tokenizer), labels.outputs, 0.0, 1)
    goal = objective.build(config("method=regression_head", "data=scored").method, made, [1, 1, 1])
    values = torch.tensor([[0.2], [-1.0], [0.9], [0.0]])
    prompts = zip(made.encode(TEXTS), values.tolist(), strict=True)
    rows = [{**made.text_row(prompt, 0), "values": value} for prompt, value in prompts]
    output = torch.from_numpy(scoring.scorer(model, made, 1000)(TEXTS)).float()
    assert output.shape == (4, 1)
    expected = functional.huber_loss(output, values, reduction="sum", delta=0.1)
    assert goal.total(model, Collator(0)(rows)).item() == pytest.approx(float(expected), rel=1e-5)
