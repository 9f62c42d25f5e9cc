"""Label scoring instead of parsing: the log-probability of each whole label after a prompt.

Letters: b rows of a batch, s tokens, c classes, v vocabulary, m nodes of the label tree, k = 1 + m positions read.

Multi-token labels are scored in one forward pass over prompt and label tree (`finsa/inference/label_tree.py`), or in
one pass per label if the model's layers ignore masks. Causal models are padded on the right, so no real token attends
to padding, and no mask is needed if the tree has only one branch.

All prompts have the same prefix; if it is a large share of the tokens, its keys and values are computed once. The LM
head is applied only at the k positions that are read, but over the whole vocabulary, which log-probabilities need: for
Qwen2.5-0.5B, 0.4 % of the work for 100 tokens.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from finsa.config import RunConfig
from finsa.config import Thought as Settings
from finsa.data.prompts import with_target
from finsa.data.rows import Encoded, Renderer
from finsa.data.values import TASKS
from finsa.errors import ModelError
from finsa.inference.graphs import of_labels
from finsa.inference.label_tree import Answer, LabelTree, after_cache, scored_answers, tree_inputs
from finsa.inference.thinking import Thought, ThoughtWriter
from finsa.models import attention, hardware, int8
from finsa.models.batches import batches, padded
from finsa.models.classifier import Classifier, unwrap_peft
from finsa.models.moe.mixture import Mixture
from finsa.runs import processes
from finsa.runs.progress import Moved, ignored

FloatArray = NDArray[np.float64]
# Share of all tokens, and number of tokens, below which reusing the prefix gains nothing (measured).
PREFIX_SHARE, PREFIX_TOKENS = 0.3, 16


def label_log_probs(
    model: torch.nn.Module,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    tree: LabelTree,
    past: Any = None,
    **inputs: Any,
) -> torch.Tensor:
    """Log-probability of each whole label after each prompt, in one forward pass; also used in training.

    Args:
        model: a causal language model, wrapped or not.
        ids: (b, s), each prompt followed by the tree's tokens and padding.
        lengths: number of tokens of each prompt, (b,).
        tree: prefix tree of the labels.
        past: keys and values of the tokens before `ids`, (b, ...) per layer.
        inputs: further inputs of the model: a mixture's ``text_span``.

    Returns:
        (b, c), float32.

    Raises:
        ModelError: if the tree branches and a mask cannot separate the branches.
    """
    m, before = len(tree.tokens), 0 if past is None else past.get_seq_length()
    read = lengths[:, None] - 1 + torch.arange(m + 1, device=ids.device)
    if not tree.chain:
        if not attention.full_attention(model, before + ids.shape[1]):
            raise ModelError(
                "labels of several tokens: this model's layers ignore the mask that separates labels, or attend to "
                f"less than {before + ids.shape[1]} tokens; choose a smaller data.max_length, or labels of one token"
            )
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        inputs |= tree_inputs(tree, lengths, ids.shape[1], dtype)
    if past is not None:
        inputs |= {**after_cache(inputs, before), "past_key_values": past}
    tokens = sorted({token for steps in tree.steps for _, token in steps})
    # The normalizer of labels of one token is the same for all of them, and so has no effect on their probabilities.
    only = not tree.tokens and int8.is_quantized(model)
    with attention.last_mlp_at(model, read, ids.shape[1]), (label_rows if only else float32_logits)(model, tokens):
        logits = model(input_ids=ids, logits_to_keep=read, use_cache=past is not None, **inputs).logits
    log_probs = torch.log_softmax(logits.float(), dim=-1)  # (b, k, v)
    # One gather, because the backward pass of each single selection would fill a tensor of the size of `log_probs`.
    places = {step: number for number, step in enumerate(dict.fromkeys(step for steps in tree.steps for step in steps))}
    read_at = [(node, tokens.index(token)) for node, token in places] if only else list(places)
    at, token = hardware.to_device(torch.tensor(read_at).T, log_probs.device)
    chosen = log_probs[:, at, token].unbind(dim=1)
    columns = [sum(chosen[places[step]] for step in steps) for steps in tree.steps]
    return torch.stack([torch.as_tensor(column) for column in columns], dim=1)


@contextmanager
def float32_logits(model: torch.nn.Module, tokens: Sequence[int]) -> Iterator[None]:
    """Compute the logits of some tokens in float32 in a half-precision LM head, within this context.

    bfloat16 rounds a logit between 16 and 32 to a multiple of 0.125, so labels tie and the first one wins, as in 195 of
    2,387 test rows of TFNS with SmolLM2-135M. The normalizer is the same for all labels, so it is not recomputed.

    Args:
        model: a causal language model or a mixture, wrapped or not. Nothing changes if its head is quantized,
            adapted or sharded.
        tokens: label tokens, without duplicates.
    """
    body: Any = attention.causal_model(model)
    head = body.get_output_embeddings() if isinstance(body, PreTrainedModel) else None
    if type(head) is not torch.nn.Linear or head.weight.dtype == torch.float32 or processes.is_sharded(model):
        yield
        return

    def refine(module: torch.nn.Module, given: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        at = hardware.to_device(torch.tensor(tokens), logits.device)
        bias = None if head.bias is None else head.bias[at].float()
        kind = logits.device.type
        rounds = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if rounds else nullcontext():
            exact = torch.nn.functional.linear(given[0].float(), head.weight[at].float(), bias)
        return logits.float().index_copy_(-1, at, exact)

    hook = head.register_forward_hook(refine)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def label_rows(model: Any, tokens: Sequence[int]) -> Iterator[None]:
    """Compute the logits of some tokens only, (b, k, len(tokens)), within this context.

    Args:
        model: a causal language model, wrapped or not, whose LM head is a linear layer.
        tokens: label tokens, without duplicates.
    """
    head = attention.causal_model(model).get_output_embeddings()
    weight, bias = head.weight[tokens], None if head.bias is None else head.bias[tokens]
    head.forward = lambda states: torch.nn.functional.linear(states, weight, bias)
    try:
        yield
    finally:
        del head.forward  # that of its class remains


class LabelScorer:
    """Scores texts: (n, c) log-probabilities of each whole label given the prompt.

    Args:
        model: a causal language model; set to evaluation mode while scoring.
        renderer: renders prompts.
        batch_tokens: maximum number of padded tokens per batch.

    Attributes:
        gates: after scoring with a mixture, the expert weights of each prompt, (n, E); None for other models.
        thoughts: after scoring with a model that thinks, the thoughts of each prompt, (n, k); None for other models.
    """

    thoughts: list[list[Thought]] | None = None

    def __init__(self, model: torch.nn.Module, renderer: Renderer, batch_tokens: int) -> None:
        self.model, self.renderer, self.batch_tokens = model, renderer, batch_tokens
        self.gates: FloatArray | None = None
        answers, self.rule = scored_answers(renderer)
        self.tree, self.width = LabelTree.of(answers), len(answers)
        self._answers, self._trees, self._prefix = answers, [self.tree], None

    def __call__(self, texts: Sequence[str]) -> FloatArray:
        """Score texts in order."""
        return self.score(self.renderer.encode(texts))

    @torch.inference_mode()
    def score(self, prompts: Sequence[Sequence[int]], moved: Moved = ignored) -> FloatArray:
        """Score prompts in order: (n, c) natural log; the processes of a job divide the batches.

        Args:
            prompts: (n,).
            moved: called after each batch with its number of prompts.
        """
        scores = np.zeros((len(prompts), self.width))
        extra = len(self.tree.tokens)
        if isinstance(prompts, Encoded):
            lengths = (prompts.lengths + extra).tolist()
        else:
            lengths = [len(prompt) + extra for prompt in prompts]
        training = self.model.training
        mixture = self.model if isinstance(self.model, Mixture) else None
        gates = None if mixture is None else np.zeros((len(prompts), len(mixture.experts)))
        # Copied to the CPU at the end, so that no batch synchronizes with the device.
        results = list[tuple[list[int], torch.Tensor, torch.Tensor | None]]()
        self.model.eval()
        self._trees = trees_for(self.model, self._answers, max(lengths, default=0))
        self._prefix = self._shared(prompts, lengths)
        waiting = processes.shard(list(batches(lengths, self.batch_tokens)))
        while waiting:
            rows, counts = waiting[0]
            log_probs = self._attempt([prompts[row] for row in rows])
            if log_probs is None:
                waiting = self._smaller([batch for batch, _ in waiting], lengths)
                continue
            del waiting[0]
            moved(len(rows) * processes.world_size())  # each process has scored a batch of about this size
            if not counts:
                continue
            results.append((rows, log_probs.double(), None if mixture is None else mixture.gates().double()))
        for rows, log_probs, shares in results:
            scores[rows] = log_probs.cpu().numpy()
            if gates is not None and shares is not None:
                gates[rows] = shares.cpu().numpy()
        self._prefix = None
        self.model.train(training)
        self.gates = None if gates is None else processes.all_reduce(gates)
        return of_labels(processes.all_reduce(scores), self.renderer.labels)

    def _attempt(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor | None:
        """Score one batch; None if it runs out of memory and can be made smaller."""
        try:
            return self._batch(prompts)
        except (RuntimeError, MemoryError) as error:
            if len(prompts) == 1 or processes.is_distributed() or not hardware.out_of_memory(error):
                raise
        hardware.release_memory()  # outside of the handler, whose traceback keeps the tensors alive
        return None

    def _smaller(self, waiting: list[list[int]], lengths: Sequence[int]) -> list[tuple[list[int], bool]]:
        """Halve the batch size, also for later calls of this scorer."""
        self.batch_tokens = max(1, min(self.batch_tokens, len(waiting[0]) * lengths[waiting[0][0]]) // 2)
        print(f"out of memory: {self.batch_tokens} tokens per batch from now on", file=sys.stderr)
        rows = [row for batch in waiting for row in batch]
        smaller = batches([lengths[row] for row in rows], self.batch_tokens)
        return [([rows[at] for at in batch], True) for batch in smaller]

    def _shared(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Any:
        """Keys and values (1, ...) of the prompts' prefix; None if reusing them gains nothing or is not possible."""
        if not isinstance(prompts, Encoded) or len(prompts) < 2 or not self._reuses(max(lengths)):
            return None
        prefix = prompts.prefix if prompts.suffix else prompts.prefix[:-1]  # the last token's logits are read
        if len(prefix) < PREFIX_TOKENS or len(prefix) * len(prompts) < PREFIX_SHARE * sum(lengths):
            return None
        ids = torch.tensor([prefix], device=next(self.model.parameters()).device)
        return unwrap_peft(self.model).base_model(input_ids=ids, use_cache=True).past_key_values

    def _reuses(self, longest: int) -> bool:
        """Whether a prefix has the same states before every text; in a mixture they depend on the text's experts."""
        if getattr(self.model, "experts", ()) or processes.is_sharded(self.model):
            return False
        return attention.full_attention(self.model, longest)

    def _batch(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Score one batch: (b, c)."""
        device = next(self.model.parameters()).device
        before = 0 if self._prefix is None else self._prefix.get_seq_length()
        lengths = hardware.to_device(torch.tensor([len(prompt) - before for prompt in prompts]), device)
        inputs = (
            {"text_span": hardware.to_device(self._spans(prompts), device)} if isinstance(self.model, Mixture) else {}
        )
        columns = []
        for tree in self._trees:
            past = copy.deepcopy(self._prefix)
            if past is not None:
                past.batch_repeat_interleave(len(prompts))
            ids = hardware.to_device(padded([[*prompt[before:], *tree.tokens] for prompt in prompts]), device)
            columns.append(label_log_probs(self.model, ids, lengths, tree, past, **inputs))
        return torch.cat(columns, dim=1)

    def _spans(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Start and end of each prompt's text, (b, 2)."""
        return torch.tensor([self.renderer.text_span(prompt) for prompt in prompts])


def contextual_bias(label_scorer: LabelScorer, targets: bool) -> FloatArray:
    """Mean log-probabilities of the labels after content-free texts, (c,) (contextual calibration, Zhao et al. 2021).

    Args:
        label_scorer: of the model.
        targets: whether the prompt asks for a target.
    """
    texts = [with_target("N/A", text) if targets else text for text in ("N/A", "[MASK]", "")]
    return label_scorer(texts).mean(axis=0)


def trees_for(model: Any, answers: Sequence[Answer], longest: int) -> list[LabelTree]:
    """One tree of all labels, or one per label if a mask cannot separate them.

    Args:
        model: a causal language model or a mixture.
        answers: tokens of each label, at least one.
        longest: number of tokens of the longest prompt with the tree's nodes.
    """
    tree = LabelTree.of(answers)
    if tree.chain or attention.full_attention(model, longest):
        return [tree]
    return [LabelTree.of([answer]) for answer in answers]


class ClassifierScorer(LabelScorer):
    """Scores texts with a classification head: (n, c) log-probabilities, with the same interface.

    Args:
        model: a `Classifier`, or a `Mixture` with a head.
    """

    def __init__(self, model: Classifier | Mixture, renderer: Renderer, batch_tokens: int) -> None:
        super().__init__(model, renderer, batch_tokens)
        self.rule = "classification head"
        self.tree, self.width = LabelTree.of([]), renderer.labels.outputs

    def _reuses(self, longest: int) -> bool:
        return False

    def _batch(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        device = next(self.model.parameters()).device
        texts = [self.renderer.until_text_end(prompt) for prompt in prompts]
        spans = hardware.to_device(self._spans(prompts), device)
        logits: torch.Tensor = self.model(hardware.to_device(padded(texts), device), spans)
        return logits if self.renderer.labels.task in TASKS else logits.log_softmax(dim=1)


class ThinkingScorer(LabelScorer):
    """Scores texts after thoughts: the probability of each label is its mean over the thoughts of a text.

    The mean over thoughts of the probabilities over the labels is self-consistency (Wang et al. 2023) without parsing:
    each thought has one vote, divided among the labels. Thoughts do not change how probable the labels are in total.

    Args:
        model: a causal language model.
        renderer: renders prompts that open a thought.
        batch_tokens: maximum number of padded tokens per batch.
        settings: of the thoughts.
        seed: of the run.
    """

    def __init__(
        self, model: torch.nn.Module, renderer: Renderer, batch_tokens: int, settings: Settings, seed: int
    ) -> None:
        super().__init__(model, renderer, batch_tokens)
        self.settings, self.write = settings, ThoughtWriter(model, renderer, batch_tokens, settings, seed)

    def score(self, prompts: Sequence[Sequence[int]], moved: Moved = ignored) -> FloatArray:
        """Score prompts in order: (n, c) natural log."""
        self.thoughts = self.write(prompts, moved)
        log_probs = [
            super(ThinkingScorer, self).score([*map(self._after, prompts, [row[sample] for row in self.thoughts])])
            for sample in range(self.settings.samples)
        ]
        return mean_over_thoughts(np.stack(log_probs))

    def _after(self, prompt: Sequence[int], thought: Thought) -> list[int]:
        return self.renderer.with_thought(prompt, self.renderer.thought_ids(thought.text, self.settings.max_tokens))


def mean_over_thoughts(log_probs: FloatArray) -> FloatArray:
    """Average the probabilities over the labels, and how probable the labels are in total: (k, n, c) to (n, c)."""
    if len(log_probs) == 1:
        return log_probs[0]
    total = np.logaddexp.reduce(log_probs, axis=-1, keepdims=True)
    summed = np.logaddexp.reduce(log_probs - total, axis=0) + np.logaddexp.reduce(total, axis=0)
    return summed - 2 * np.log(len(log_probs))


def thought_costs(label_scorer: Any) -> dict[str, float]:
    """Generated tokens per answer and share of cut thoughts, of the texts scored last; empty without thoughts."""
    written = getattr(label_scorer, "thoughts", None)
    if not written:
        return {}
    tokens = [sum(thought.tokens for thought in row) for row in written]
    cut = [thought.cut for row in written for thought in row]
    return {"thought_tokens": round(float(np.mean(tokens)), 1), "thoughts_cut": round(float(np.mean(cut)), 4)}


def scorer(model: torch.nn.Module, renderer: Renderer, batch_tokens: int, cfg: RunConfig | None = None) -> LabelScorer:
    """The scorer of a model: of its classification head if it has one, otherwise of its label words.

    Args:
        model: the model.
        renderer: of its prompts.
        batch_tokens: maximum number of padded tokens per batch.
        cfg: of a run whose model may think before it answers; None: it does not.
    """
    if isinstance(model, Classifier) or (isinstance(model, Mixture) and model.head is not None):
        return ClassifierScorer(model, renderer, batch_tokens)
    if cfg is not None and cfg.model.think == "open":
        return ThinkingScorer(model, renderer, batch_tokens, cfg.model.thought, cfg.seed)
    return LabelScorer(model, renderer, batch_tokens)
