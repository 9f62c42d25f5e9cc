"""Labels are scored, not parsed: the log-probability of each whole label after a prompt.

Letters: b rows of a batch, s tokens, c classes, v vocabulary, m nodes of the label tree, k = 1 + m positions read.

Several labels may have several tokens and share beginnings (看涨, 看跌). Their proper prefixes form a tree; one forward
pass over prompt + tree nodes, each node seeing only the prompt and its ancestors, gives every token's probability.
Padding stands on the right of a causal model, so no real token can see it and no mask is needed where m = 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from finsa.data.rows import Encoded, Renderer

FloatArray = NDArray[np.float64]
Answer = tuple[int, ...]


@dataclass(frozen=True)
class LabelTree:
    """Proper prefixes of the labels, as nodes after the prompt.

    Args:
        tokens: the token of each node, (m,).
        parents: its parent's position among root (0) and nodes (1..m), (m,).
        depths: 1 for a first token, (m,).
        steps: per label, (position read, token) for each of its tokens.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    steps: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> LabelTree:
        """Build the tree of the answers' proper prefixes."""
        prefixes = sorted({answer[:n] for answer in answers for n in range(1, len(answer))}, key=lambda p: (len(p), p))
        position = {(): 0} | {prefix: number for number, prefix in enumerate(prefixes, start=1)}
        return cls(
            tokens=tuple(prefix[-1] for prefix in prefixes),
            parents=tuple(position[prefix[:-1]] for prefix in prefixes),
            depths=tuple(len(prefix) for prefix in prefixes),
            steps=tuple(tuple((position[a[:n]], a[n]) for n in range(len(a))) for a in answers),
        )

    def ancestors(self) -> torch.Tensor:
        """Which nodes a node sees, itself included: (m, m) booleans."""
        sees = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent > 0:
                sees[node] |= sees[parent - 1]
        return sees


def scored_answers(renderer: Renderer) -> tuple[list[Answer], str]:
    """What is scored for each label, and the name of the rule, which a run records.

    A label that begins another one could never lose against it without its end, so then every end token counts.
    """
    answers = renderer.answers
    nested = any(a != b and b[: len(a)] == a for a in answers for b in answers)
    if nested:
        return [(*answer, renderer.end) for answer in answers], "whole label and end token"
    return list(answers), "whole label"


class LabelScorer:
    """Scores texts: (n, c) log-probabilities of each whole label given the prompt.

    Args:
        model: a causal language model, in evaluation mode while it scores.
        renderer: makes prompts of texts.
        batch_tokens: most padded tokens of a batch.
    """

    def __init__(self, model: torch.nn.Module, renderer: Renderer, batch_tokens: int) -> None:
        self.model, self.renderer, self.batch_tokens = model, renderer, batch_tokens
        answers, self.rule = scored_answers(renderer)
        self.tree = LabelTree.of(answers)

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """Score texts, in their order."""
        return self.score(self.renderer.encode(texts))

    @torch.inference_mode()
    def score(self, prompts: Sequence[Sequence[int]]) -> FloatArray:
        """Score prompts, in their order: (n, c) natural logarithms."""
        scores = np.empty((len(prompts), len(self.tree.steps)))
        training = self.model.training
        self.model.eval()
        for rows in batches(_lengths(prompts, len(self.tree.tokens)), self.batch_tokens):
            scores[rows] = self._batch([prompts[row] for row in rows]).double().cpu().numpy()
        self.model.train(training)
        return scores

    def _batch(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Score one batch: (b, c)."""
        device = next(self.model.parameters()).device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        m = len(self.tree.tokens)
        ids = torch.zeros(len(prompts), int(lengths.max()) + m, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt) + m] = torch.tensor([*prompt, *self.tree.tokens])
        read = lengths[:, None] - 1 + torch.arange(m + 1)
        extra = self._tree_inputs(lengths, ids.shape[1]) if m > 0 else {}
        logits = self.model(
            input_ids=ids.to(device),
            logits_to_keep=read.to(device),
            use_cache=False,
            **{name: tensor.to(device) for name, tensor in extra.items()},
        ).logits
        log_probs = torch.log_softmax(logits.float(), dim=-1)  # (b, k, v)
        columns = [sum(log_probs[:, at, token] for at, token in steps) for steps in self.tree.steps]
        return torch.stack([torch.as_tensor(column) for column in columns], dim=1)

    def _tree_inputs(self, lengths: torch.Tensor, s: int) -> dict[str, torch.Tensor]:
        """Attention mask (b, 1, s, s), additive, and positions (b, s) for prompts followed by tree nodes."""
        m = len(self.tree.tokens)
        sees = torch.ones(s, s, dtype=torch.bool).tril().repeat(len(lengths), 1, 1)
        positions = torch.arange(s).repeat(len(lengths), 1)
        ancestors, depths = self.tree.ancestors(), torch.tensor(self.tree.depths)
        for row, length in enumerate(lengths.tolist()):
            sees[row, length : length + m, length : length + m] = ancestors
            positions[row, length : length + m] = length - 1 + depths
        dtype = next(self.model.parameters()).dtype
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
        return {"attention_mask": mask[:, None], "position_ids": positions}


def _lengths(prompts: Sequence[Sequence[int]], extra: int) -> list[int]:
    if isinstance(prompts, Encoded):
        return (prompts.lengths + extra).tolist()
    return [len(prompt) + extra for prompt in prompts]


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Group rows of like lengths into batches of at most `batch_tokens` padded tokens.

    Yields:
        Row numbers; longest first, so that a memory problem shows at once. A longer row makes a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
