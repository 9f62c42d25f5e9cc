"""Generated answers, a cross-check of the scored labels; `finsa.evaluation.audit.parse` finds their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from finsa.data.prompts import OPEN
from finsa.data.rows import Encoded, Renderer
from finsa.models.batches import batches
from finsa.runs import processes
from finsa.runs.progress import Moved, ignored


class Generator:
    """Generates greedy answers to prompts, in left-padded batches.

    Args:
        model: a causal language model, wrapped or not.
        renderer: its tokenizer decodes the answers.
        batch_tokens: maximum number of padded tokens per batch.
        most: maximum number of tokens per answer.
    """

    def __init__(self, model: Any, renderer: Renderer, batch_tokens: int, most: int) -> None:
        self.model, self.renderer, self.batch_tokens, self.most = model, renderer, batch_tokens, most
        self.settings = GenerationConfig(
            do_sample=False, max_new_tokens=most, eos_token_id=ends_of(model, renderer.end), pad_token_id=renderer.end
        )

    @torch.inference_mode()
    def __call__(self, prompts: Encoded, moved: Moved = ignored) -> list[str]:
        """Generate answers in the order of the prompts; the processes of a job divide the batches.

        If the prompt opens a think block, the answer starts with that tag, so that it can be parsed without the prompt.

        Args:
            prompts: (n,).
            moved: called after each batch with its number of prompts.
        """
        tokens = np.zeros((len(prompts), self.most), dtype=np.int64)  # token ids plus 1; 0: no token
        self.model.eval()
        device = next(self.model.parameters()).device
        for rows, counts in processes.shard(list(batches((prompts.lengths + self.most).tolist(), self.batch_tokens))):
            if not counts:  # no model is sharded here, so no process waits for this one
                continue
            ids, mask = left_padded([prompts[row] for row in rows], self.renderer.end)
            generated = self.model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=self.settings
            )
            new = generated[:, ids.shape[1] :].cpu().numpy()
            tokens[rows, : new.shape[1]] = new + 1
            moved(len(rows) * processes.world_size())
        answers = [(row[row > 0] - 1).tolist() for row in processes.all_reduce(tokens)]
        tokenizer = self.renderer.tokenizer
        opened = OPEN if tokenizer.decode(self.renderer.suffix).rstrip().endswith(OPEN) else ""
        return [opened + answer for answer in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def ends_of(model: Any, end: int) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's generation config."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return sorted({end, *(ends if isinstance(ends, list) else [] if ends is None else [ends])})


def left_padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack rows of token ids, padded on the left, and their mask: (b, s) each."""
    longest = max(map(len, rows))
    ids = torch.tensor([[filler] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
