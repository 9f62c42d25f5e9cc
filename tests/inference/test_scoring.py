"""The optimized scorer against a plain one: every label's tokens, one sequence at a time, full logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from base_models import EXTRA, small
from hypothesis import given
from hypothesis import strategies as st

from finsa.data.labels import LabelSpace
from finsa.data.rows import Encoded
from finsa.errors import ModelError
from finsa.inference.label_tree import LabelTree, scored_answers
from finsa.inference.scoring import LabelScorer, label_log_probs
from finsa.models.batches import batches

ANSWERS = {
    "one token each": [(7,), (8,), (9,)],
    "different lengths": [(7, 3), (8,), (9, 4, 5)],
    "shared beginnings": [(7, 3), (7, 4), (7, 3, 5), (9,)],
}


class FakeRenderer:
    """The part of a renderer that the scorer needs for given prompts."""

    end = 1

    def __init__(self, answers: list[tuple[int, ...]]) -> None:
        self.answers = answers
        names = tuple(map(str, answers))
        self.labels = LabelSpace(names, names)


def prompts(seed: int = 0, rows: int = 9) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 50, size=length).tolist() for length in rng.integers(1, 30, size=rows)]


@torch.no_grad()
def plainly(model: torch.nn.Module, rows: list[list[int]], answers: list[tuple[int, ...]]) -> np.ndarray:
    """One forward per row and label, no padding, no mask, logits of all positions."""
    scores = np.zeros((len(rows), len(answers)))
    for r, row in enumerate(rows):
        for a, answer in enumerate(answers):
            log_probs = model(input_ids=torch.tensor([[*row, *answer]])).logits.float().log_softmax(-1)[0]
            scores[r, a] = sum(float(log_probs[len(row) - 1 + n, token]) for n, token in enumerate(answer))
    return scores


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS.keys())
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", EXTRA)
def test_batched_tree_equals_one_sequence_per_label(
    model_type: str, attention: str, answers: list[tuple[int, ...]]
) -> None:
    model, renderer = small(model_type, attention), FakeRenderer(answers)
    scored, _ = scored_answers(renderer)  # type: ignore[arg-type]
    fast = LabelScorer(model, renderer, batch_tokens=120).score(prompts())  # type: ignore[arg-type]
    np.testing.assert_allclose(fast, plainly(model, prompts(), scored), atol=2e-5)


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_scores_do_not_depend_on_the_batch(batch_tokens: int) -> None:
    model, renderer = small("qwen2"), FakeRenderer(ANSWERS["different lengths"])
    alone = np.concatenate([LabelScorer(model, renderer, 1).score([row]) for row in prompts()])  # type: ignore[arg-type]
    together = LabelScorer(model, renderer, batch_tokens).score(prompts())  # type: ignore[arg-type]
    np.testing.assert_allclose(together, alone, atol=2e-5)


def test_a_label_that_is_a_prefix_of_another_is_scored_with_its_end_token() -> None:
    nested, rule = scored_answers(FakeRenderer([(7,), (7, 3)]))  # type: ignore[arg-type]
    assert nested == [(7, 1), (7, 3, 1)]
    assert rule == "whole label and end token"
    assert scored_answers(FakeRenderer([(7,), (8, 3)])) == ([(7,), (8, 3)], "whole label")  # type: ignore[arg-type]


def test_whole_labels_of_a_complete_tree_sum_to_one() -> None:
    model = small("qwen2")
    every = [(first, second) for first in range(50) for second in range(50)]
    scores = LabelScorer(model, FakeRenderer(every), 10_000).score(prompts(rows=2))  # type: ignore[arg-type]
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1.0, atol=1e-4)


def test_scoring_leaves_the_model_in_its_mode() -> None:
    model = small("qwen2").train()
    LabelScorer(model, FakeRenderer(ANSWERS["one token each"]), 100).score(prompts())  # type: ignore[arg-type]
    assert model.training


def test_the_tree_contains_each_proper_prefix_once() -> None:
    tree = LabelTree.of([(7, 3), (7, 4), (7, 3, 5), (9,)])
    assert tree.tokens == (7, 3)
    assert tree.parents == (0, 1)
    assert tree.depths == (1, 2)
    assert tree.steps == (((0, 7), (1, 3)), ((0, 7), (1, 4)), ((0, 7), (1, 3), (2, 5)), ((0, 9),))
    assert tree.ancestors().tolist() == [[True, False], [True, True]]


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 200))
def test_batches_contain_every_row_once_within_the_limit(lengths: list[int], bound: int) -> None:
    made = list(batches(lengths, bound))
    assert sorted(row for batch in made for row in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= bound for batch in made)


class CountingModel(torch.nn.Module):
    """Forwards everything, and counts the tokens that go through the layers."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.tokens = model, 0
        model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, words: tuple[object, ...], named: dict[str, torch.Tensor]) -> None:
        self.tokens += named["input_ids"].numel()


def encoded(head: int, tail: int, seed: int = 0, rows: int = 9) -> Encoded:
    """Prompts with one prefix and suffix around texts of different lengths, including an empty one."""
    rng = np.random.default_rng(seed)
    lengths = np.array([0, *rng.integers(1, 12, size=rows - 1)])
    tokens = rng.integers(2, 50, size=lengths.sum()).astype(np.int32)
    ends = rng.integers(2, 50, size=head).tolist(), rng.integers(2, 50, size=tail).tolist()
    return Encoded(*ends, tokens, np.cumsum(lengths), np.zeros(rows, np.int64))


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS.keys())
@pytest.mark.parametrize("tail", [0, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", EXTRA)
def test_a_shared_prefix_computed_once_changes_no_score(
    model_type: str, attention: str, tail: int, answers: list[tuple[int, ...]]
) -> None:
    model, renderer, rows = small(model_type, attention), FakeRenderer(answers), encoded(30, tail)
    counted = CountingModel(model)
    with_head = LabelScorer(model, renderer, 300).score(rows)  # type: ignore[arg-type]
    reused, counted.tokens = counted.tokens, 0
    plain = LabelScorer(model, renderer, 300).score([list(row) for row in rows])  # type: ignore[arg-type]
    np.testing.assert_allclose(with_head, plain, atol=1e-5)
    assert reused < 0.6 * counted.tokens


@pytest.mark.parametrize(("window", "within"), [(64, True), (16, False)])
def test_sliding_windows_are_ordinary_attention_for_rows_that_fit(window: int, within: bool) -> None:
    """Gemma 3: one pass for all labels and a shared prefix if rows fit; the same scores in any case."""
    model, rows = small("gemma3_text", sliding_window=window), encoded(30, 4)
    answers = ANSWERS["shared beginnings"]
    scorer = LabelScorer(model, FakeRenderer(answers), 300)  # type: ignore[arg-type]
    counted = CountingModel(model)
    found = scorer.score(rows)
    once = counted.tokens < 1.2 * sum(map(len, rows))  # one pass per label would be four times as many
    assert (len(scorer._trees) == 1) is once is within
    np.testing.assert_allclose(
        found, plainly(model, [list(row) for row in rows], scored_answers(scorer.renderer)[0]), atol=2e-5
    )
    if not within:
        with pytest.raises(ModelError, match="choose a smaller data.max_length, or labels of one token"):
            label_log_probs(model, torch.ones(1, 40, dtype=torch.long), torch.tensor([30]), scorer.tree)


@pytest.mark.parametrize(("head", "reused"), [(8, False), (30, True)])
def test_a_short_prefix_is_not_reused(head: int, reused: bool) -> None:
    model, renderer = small("qwen2"), FakeRenderer(ANSWERS["one token each"])
    scorer, rows = LabelScorer(model, renderer, 300), encoded(head, 2)  # type: ignore[arg-type]
    assert (scorer._shared(rows, rows.lengths.tolist()) is not None) is reused


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()], ids=["cuda", "host"])
def test_out_of_memory_halves_the_batches_and_changes_no_score(error: BaseException) -> None:
    scorer = LabelScorer(small(), FakeRenderer([(7,), (8,)]), batch_tokens=400)  # type: ignore[arg-type]
    wanted, sizes, plain = scorer.score(prompts()), [], scorer._batch

    def scarce(rows: list[list[int]]) -> torch.Tensor:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise error
        return plain(rows)

    scorer._batch = scarce  # type: ignore[method-assign,assignment]
    np.testing.assert_allclose(scorer.score(prompts()), wanted, atol=2e-6)
    assert max(sizes) > 2
    assert sum(size for size in sizes if size <= 2) == 9  # every row once
    assert scorer.batch_tokens < 400
    with pytest.raises(RuntimeError, match="no memory question"):
        scorer._batch = lambda rows: (_ for _ in ()).throw(RuntimeError("no memory question"))  # type: ignore
        scorer.score(prompts())


@torch.no_grad()
def test_float32_logits_separate_the_labels_of_a_bfloat16_model() -> None:
    """With logits near 20, bfloat16 rounds to 0.125; the label differences equal those of a float32 head instead."""
    model = small("llama", "sdpa").bfloat16()
    model.lm_head.weight *= 20 / model(input_ids=torch.tensor([prompts()[0]])).logits.abs().mean()
    rows = prompts(rows=40)
    found = LabelScorer(model, FakeRenderer(ANSWERS["one token each"]), batch_tokens=1).score(rows)  # type: ignore[arg-type]
    last = [model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1].float() for row in rows]
    exact = (torch.stack(last) @ model.lm_head.weight[[7, 8, 9]].float().T).double().numpy()
    np.testing.assert_allclose(np.diff(found), np.diff(exact), atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as in a trainer that validates within it
        again = LabelScorer(model, FakeRenderer(ANSWERS["one token each"]), batch_tokens=1).score(rows)  # type: ignore[arg-type]
    np.testing.assert_allclose(np.diff(again), np.diff(exact), atol=1e-4)
    rounded = model(input_ids=torch.tensor([rows[0]])).logits[0, -1, [7, 8, 9]].double().numpy()
    assert np.abs(np.diff(rounded) - np.diff(exact[0])).max() > 1e-2  # what the model itself returns
