"""Preference losses and expected rewards: the values and gradients of trl's trainers, and of sums over all labels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from base_models import small
from datasets import Dataset

from finsa.config import Preference, RunConfig
from finsa.data.labels import LabelSpace
from finsa.data.prompts import Prompt
from finsa.data.rows import Renderer
from finsa.inference.label_tree import LabelTree
from finsa.inference.scoring import scorer
from finsa.training import objective
from finsa.training.batches import Collator

Configure = Callable[..., RunConfig]
TEXTS = ["净利润同比增长三成", "跌停", "公司召开董事会会议，审议通过三项议案", "减持"]
GOLD, REJECTED = [2, 0, 1, 0], [0, 1, 2, 2]
WORDS = ("利空", "中性", "重大利好")  # of different numbers of tokens
COSTS = torch.tensor([[0.0, 1.0, 3.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]])


def settings(loss: str) -> Preference:
    return Preference(loss=loss, beta=0.3, margin=0.4, folds=2, mistakes_only=False)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def models(tokenizer: Any) -> tuple[Any, Any]:
    """A policy and the model that it started from."""
    policy = small(vocabulary=len(tokenizer)).requires_grad_(True)
    start = copy.deepcopy(policy).requires_grad_(False)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return policy.eval(), start.eval()


@pytest.fixture(scope="module")
def renderer(tokenizer: Any) -> Renderer:
    return Renderer(tokenizer, Prompt("文本：", "\n情感："), LabelSpace(WORDS, WORDS), 64)


def ours(loss: str, models: tuple[Any, Any], renderer: Renderer) -> tuple[float, torch.Tensor]:
    """The mean loss of the rows by finsa, and its gradient with respect to the first projection."""
    policy, start = models
    lengths = [len(answer) for answer in renderer.answers]
    tree = LabelTree.of(renderer.answers)
    goal = objective.of_pairs(objective.label_word_log_probs(tree), settings(loss), lengths, tree.tokens)
    reference = scorer(start, renderer, 1000)(TEXTS)
    rows = [
        {**renderer.row(prompt, gold, "label"), "rejected": wrong, "reference": scores.tolist()}
        for prompt, gold, wrong, scores in zip(renderer.encode(TEXTS), GOLD, REJECTED, reference, strict=True)
    ]
    batch = Collator(0, goal.suffix)(rows)
    return graded(policy, goal.total(policy, batch) / goal.weight(batch))


def graded(policy: Any, loss: torch.Tensor) -> tuple[float, torch.Tensor]:
    policy.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), policy.model.layers[0].self_attn.q_proj.weight.grad.clone()


def examples(renderer: Renderer) -> list[dict[str, list[int]]]:
    prompts = renderer.encode(TEXTS)
    return [
        {
            "prompt_ids": prompt,
            "chosen_ids": list(renderer.answers[gold]),
            "rejected_ids": list(renderer.answers[wrong]),
        }
        for prompt, gold, wrong in zip(prompts, GOLD, REJECTED, strict=True)
    ]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # trl sets it itself
@pytest.mark.parametrize(("loss", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_a_pairs_loss_and_gradient_are_those_of_trls_trainer(
    loss: str, theirs: str, models: tuple[Any, Any], renderer: Renderer, tokenizer: Any, tmp_path: Any
) -> None:
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    args = DPOConfig(str(tmp_path), beta=0.3, loss_type=[theirs], use_cpu=True, bf16=False, report_to="none")
    args.gradient_checkpointing = False
    policy, start = models
    trainer = DPOTrainer(policy, start, args=args, train_dataset=rows, processing_class=tokenizer)
    inputs = DataCollatorForPreference(pad_token_id=0)(examples(renderer))
    wanted, gradient = graded(policy, trainer._compute_loss(policy.eval(), inputs, False))
    found, mine = ours(loss, models, renderer)
    assert found == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(mine, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_kto_is_that_of_trls_trainer_with_the_divergence_as_a_sum(
    models: tuple[Any, Any], renderer: Renderer, tokenizer: Any, tmp_path: Any
) -> None:
    from trl import KTOConfig, KTOTrainer
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    policy, start = models
    both = [scorer(model, renderer, 1000)(TEXTS) for model in (policy, start)]
    log_p, log_q = (torch.from_numpy(scores).log_softmax(dim=1) for scores in both)
    moved = float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean())
    assert moved > 0.01
    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "label": flag} for flag in (True, False)])
    args = KTOConfig(str(tmp_path), beta=0.3, use_cpu=True, bf16=False, report_to="none")
    trainer = KTOTrainer(policy, start, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer._compute_kl_logps = lambda model, batch: torch.full((8,), moved if model is not start else 0.0)
    unpaired = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row[f"{side}_ids"], "label": side == "chosen"}
        for side in ("chosen", "rejected")
        for row in examples(renderer)
    ]
    for row in unpaired:
        row["KL_completion_ids"] = row["completion_ids"]
    inputs = DataCollatorForUnpairedPreference(pad_token_id=0)(unpaired)
    wanted, gradient = graded(policy, trainer._compute_loss(policy.eval(), inputs, False))
    found, mine = ours("kto", models, renderer)
    assert found == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(mine, gradient, rtol=1e-3, atol=1e-6)


def log_probs_of_pairs(models: tuple[Any, Any], renderer: Renderer) -> torch.Tensor:
    """Mean log-probability per token of the chosen and the rejected labels by the policy, (n, 2)."""
    scores = torch.from_numpy(scorer(models[0], renderer, 1000)(TEXTS))
    pair = torch.tensor([GOLD, REJECTED]).T
    return scores.gather(1, pair) / torch.tensor([len(answer) for answer in renderer.answers])[pair]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_orpo_and_simpo_are_those_of_trls_trainers(
    models: tuple[Any, Any], renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    on_cpu = SimpleNamespace(device=torch.device("cpu"))
    mean = log_probs_of_pairs(models, renderer)
    odds = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.3, accelerator=on_cpu), mean[:, 0], mean[:, 1])[0]
    # trl adds the cross-entropy of prompt and answer; here the answer alone carries loss.
    assert ours("orpo", models, renderer)[0] == pytest.approx(float((-mean[:, 0] - odds).mean()), rel=1e-4)
    theirs = SimpleNamespace(
        beta=0.3, simpo_gamma=0.4, alpha=0.0, label_smoothing=0.0, loss_type="simpo", accelerator=on_cpu
    )
    wanted = CPOTrainer.cpo_loss(theirs, mean[:, 0], mean[:, 1])[0].mean()
    assert ours("simpo", models, renderer)[0] == pytest.approx(float(wanted), rel=1e-4)


def test_a_label_with_probability_one_has_finite_losses() -> None:
    log_probs = torch.tensor([[0.0, -60.0]], requires_grad=True)
    pair, tokens = torch.tensor([[0, 1]]), torch.ones(1, 2)
    for loss in ("dpo", "ipo", "kto", "orpo", "simpo"):
        value = objective.preference_loss(log_probs, pair, tokens, settings(loss), torch.tensor([[-1.0, -1.0]]))
        (gradient,) = torch.autograd.grad(value.sum(), log_probs)
        assert torch.isfinite(value).all(), loss
        assert torch.isfinite(gradient).all(), loss


# ------------------------------------------------------------------------------------------------ expected reward


def scores(rows: int = 5, classes: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator, dtype=torch.float64).float().requires_grad_(True)


def gradient_of(loss: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), values)[0]


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_the_gradient_of_the_expected_reward_agrees_with_finite_differences(beta: float) -> None:
    values, targets, reference = scores(), torch.tensor([0, 1, 2, 2, 0]), scores(seed=9).detach()

    def loss(given: torch.Tensor) -> torch.Tensor:
        return objective.reward_loss(given, targets, -COSTS, beta, reference).sum()

    gradient, step = gradient_of(loss(values), values), 1e-2
    for row in range(5):
        for label in range(3):
            moved = torch.zeros_like(values)
            moved[row, label] = step
            slope = (loss(values.detach() + moved) - loss(values.detach() - moved)) / (2 * step)
            assert float(gradient[row, label]) == pytest.approx(float(slope), abs=2e-3)


def test_with_accuracy_as_reward_the_gradient_is_that_of_the_expected_accuracy() -> None:
    values, targets = scores(), torch.tensor([0, 1, 2, 2, 0])
    found = gradient_of(objective.reward_loss(values, targets, torch.eye(3)), values)
    right = values.softmax(dim=1).gather(1, targets[:, None]).squeeze(1)  # the probability of a right answer
    torch.testing.assert_close(found, gradient_of(-right, values))


def test_the_gradient_is_the_advantage_of_each_label() -> None:
    values, targets = scores(), torch.tensor([0, 1, 2, 2, 0])
    p, received = values.detach().softmax(dim=1), -COSTS[targets]
    wanted = -p * (received - (p * received).sum(dim=1, keepdim=True))
    torch.testing.assert_close(gradient_of(objective.reward_loss(values, targets, -COSTS), values), wanted)


def test_two_labels_agree_with_the_closed_form() -> None:
    """With p = sigmoid(s_1 - s_0), the loss is -p and its slope -p (1 - p); beta adds those of the divergence."""
    values, reference, targets = scores(4, 2), scores(4, 2, seed=5).detach(), torch.ones(4, dtype=torch.long)
    difference = (values[:, 1] - values[:, 0]).detach()
    p = difference.sigmoid()
    loss = objective.reward_loss(values, targets, torch.eye(2), 0.5, reference)
    log_odds = reference[:, 1] - reference[:, 0]
    divergence = p * (p.log() - log_odds.sigmoid().log()) + (1 - p) * ((1 - p).log() - (-log_odds).sigmoid().log())
    torch.testing.assert_close(loss.detach(), -p + 0.5 * divergence)
    slope = -p * (1 - p) + 0.5 * p * (1 - p) * (difference - log_odds)
    torch.testing.assert_close(gradient_of(loss, values)[:, 1], slope)


def test_sampled_answers_estimate_the_same_gradient() -> None:
    """REINFORCE with the group's mean as baseline, as GRPO has it without scaling: unbiased up to (g - 1) / g."""
    values, targets, group = scores(1), torch.tensor([1]), 8
    exact = gradient_of(objective.reward_loss(values, targets, -COSTS), values)[0].numpy()
    p, draw = values.detach().softmax(dim=1)[0].numpy(), np.random.default_rng(0)
    answers = draw.choice(3, size=(40_000, group), p=p / p.sum())
    received = -COSTS[1].numpy()[answers]
    advantage = received - received.mean(axis=1, keepdims=True)
    slopes = np.eye(3)[answers] - p  # of the log-probability of each answer
    estimates = -(advantage[:, :, None] * slopes).mean(axis=1)
    error = estimates.std(axis=0) / np.sqrt(len(estimates))
    assert np.abs(estimates.mean(axis=0) - exact * (group - 1) / group) == pytest.approx(0, abs=4 * error.max())
    assert estimates.std(axis=0).max() > 0.02  # what the exact sum does without


def test_costs_are_rewards_below_zero(config: Configure) -> None:
    method = config("method=expected_reward", "method.init=base").method
    assert method.reward is not None
    table = objective.rewards(method.reward.model_copy(update={"kind": "costs"}), COSTS.tolist(), 3)
    torch.testing.assert_close(table, -COSTS)
    torch.testing.assert_close(objective.rewards(method.reward, None, 3), torch.eye(3))
