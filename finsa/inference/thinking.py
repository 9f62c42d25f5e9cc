"""Thoughts that a model writes before its answer (chain of thought, Wei et al. 2022).

A thought is generated after a prompt that opens it, until the model closes it or ends its turn, or until the thought
has ``model.thought.max_tokens`` tokens. The labels are then scored after the closed thought, see
`finsa.inference.scoring.ThinkingScorer`.

Letters: n prompts, b rows of a batch, s tokens, k samples, v vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from finsa.config import Thought as Settings
from finsa.data.rows import Renderer
from finsa.inference.generation import ends_of, left_padded
from finsa.models import hardware
from finsa.models.batches import batches
from finsa.runs import processes
from finsa.runs.progress import Moved, ignored

CANDIDATES = 1000  # tokens, at most, that are drawn from with top_p < 1; sorting a whole vocabulary takes longer


@dataclass(frozen=True)
class Thought:
    """A thought as the model wrote it.

    Args:
        text: without the marks and the white space around it.
        tokens: number of generated tokens.
        closed: whether the model wrote the closing mark.
        cut: whether it was cut at the maximum number of tokens.
    """

    text: str
    tokens: int
    closed: bool
    cut: bool


def read(ids: Sequence[int], renderer: Renderer, ends: Sequence[int], most: int) -> Thought:
    """Read generated tokens, of which those after the closing mark or an end token do not count."""
    marks = renderer.prompt.thought
    assert marks is not None
    kept = list(ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))])
    text, mark, _ = renderer.tokenizer.decode(kept).partition(marks.close)
    # A cut may split a character of several tokens.
    return Thought(text.replace("\ufffd", "").strip(), len(kept), bool(mark), not mark and len(kept) >= most)


class ThoughtWriter:
    """Generates thoughts in left-padded batches of prompts of similar length.

    Each thought is drawn with random numbers that depend only on the seed, its prompt and its number, so that a text
    has the same thoughts in any batch, up to rounding, and in every stage.

    Args:
        model: a causal language model, wrapped or not.
        renderer: of the prompts, which open a thought.
        batch_tokens: maximum number of padded tokens per batch, thoughts included.
        settings: length and sampling.
        seed: of the run.
    """

    def __init__(self, model: Any, renderer: Renderer, batch_tokens: int, settings: Settings, seed: int) -> None:
        self.model, self.renderer, self.batch_tokens = model, renderer, batch_tokens
        self.settings, self.seed, self.ends = settings, seed, ends_of(model, renderer.end)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[Sequence[int]], moved: Moved = ignored) -> list[list[Thought]]:
        """Write the thoughts of each prompt, (n, k); the processes of a job divide the batches.

        Args:
            prompts: (n,).
            moved: called after each batch with its number of prompts.
        """
        most, training = self.settings.max_tokens, self.model.training
        tokens = np.zeros((len(prompts), self.settings.samples, most), np.int32)  # token ids plus 1; 0: no token
        lengths = [len(prompts[row]) + most for row in range(len(prompts))]
        self.model.eval()
        for rows, counts in processes.shard(list(batches(lengths, self.batch_tokens))) if most else ():
            if not counts:  # no model is sharded here, so no process waits for this one
                continue
            for sample in range(self.settings.samples):
                for row, ids in zip(rows, self._generate([prompts[row] for row in rows], sample), strict=True):
                    tokens[row, sample, : len(ids)] = np.array(ids) + 1
            moved(len(rows) * processes.world_size())
        self.model.train(training)
        found = processes.all_reduce(tokens)
        return [[self._read(sample) for sample in samples] for samples in found]

    def _read(self, tokens: Any) -> Thought:
        return read((tokens[tokens > 0] - 1).tolist(), self.renderer, self.ends, max(1, len(tokens)))

    def _generate(self, prompts: Sequence[Sequence[int]], sample: int) -> list[list[int]]:
        """Tokens after each prompt of a batch, in two halves if memory does not suffice."""
        try:
            return self._batch(prompts, sample)
        except (RuntimeError, MemoryError) as error:
            if len(prompts) == 1 or not hardware.out_of_memory(error):
                raise
        hardware.release_memory()  # outside of the handler, whose traceback keeps the tensors alive
        middle = len(prompts) // 2
        return [*self._generate(prompts[:middle], sample), *self._generate(prompts[middle:], sample)]

    def _batch(self, prompts: Sequence[Sequence[int]], sample: int) -> list[list[int]]:
        marks = self.renderer.prompt.thought
        assert marks is not None
        device = next(self.model.parameters()).device
        ids, mask = (tensor.to(device) for tensor in left_padded(prompts, self.renderer.end))
        start, most = ids.shape[1], self.settings.max_tokens
        draws = torch.tensor(np.array([self._draws(prompt, sample) for prompt in prompts]), device=device)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=most, eos_token_id=self.ends, pad_token_id=self.renderer.end
        )
        sampler = [Sampler(draws, start, self.settings)] if self.settings.temperature else []
        closing = Closing(self.renderer.tokenizer, marks.close, start)
        made = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=sampler,
            stopping_criteria=[closing],
        )
        return made[:, start:].tolist()  # type: ignore[no-any-return]

    def _draws(self, prompt: Sequence[int], sample: int) -> Any:
        """A number between 0 and 1 for each token of a thought."""
        key = zlib.crc32(np.asarray(prompt, np.int64).tobytes())
        return np.random.default_rng([self.seed, sample, key]).random(self.settings.max_tokens)


class Sampler(LogitsProcessor):  # type: ignore[misc]
    """Draws tokens by inverting their cumulative distribution; greedy decoding then takes the one that is left.

    Args:
        draws: a uniform number for each token, (b, s).
        start: number of tokens of the prompts.
        settings: temperature, and the probability of the tokens to draw from (nucleus sampling, Holtzman et al. 2020).
    """

    def __init__(self, draws: torch.Tensor, start: int, settings: Settings) -> None:
        self.draws, self.start, self.settings = draws, start, settings

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits (b, v) in which only the drawn token is possible."""
        probs = (scores.double() / self.settings.temperature).softmax(-1)
        if self.settings.top_p < 1:
            ranked = probs.topk(min(CANDIDATES, probs.shape[-1])).values
            outside = ranked.cumsum(-1) - ranked >= self.settings.top_p
            probs = probs * (probs >= ranked.masked_fill(outside, 1.0).amin(-1, keepdim=True))
        # In the order of the vocabulary, in which rounding moves no token, unlike in the order of the probabilities.
        cumulative = probs.cumsum(-1)
        drawn = self.draws[:, input_ids.shape[1] - self.start, None] * cumulative[:, -1:]
        token = (cumulative <= drawn).sum(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


class Closing(StoppingCriteria):  # type: ignore[misc]
    """Ends a thought at its closing mark, whichever tokens the model writes it with.

    Args:
        tokenizer: decodes the tokens.
        mark: the closing mark.
        start: number of tokens of the prompts.
    """

    def __init__(self, tokenizer: Any, mark: str, start: int) -> None:
        self.tokenizer, self.mark, self.start = tokenizer, mark, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Whether each row has closed its thought, (b,)."""
        first = max(self.start, input_ids.shape[1] - len(self.mark.encode()))  # no token is shorter than a byte
        tails = self.tokenizer.batch_decode(input_ids[:, first:])
        return torch.tensor([self.mark in tail for tail in tails], device=input_ids.device)
