"""A data set with its tokenizer: prompts and training rows of the splits, tokenized once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray

from finsa.config import Data, Method, RunConfig
from finsa.config.base import Measure
from finsa.data import cache, sampling, values
from finsa.data.dataset import Dataset
from finsa.data.few_shot import ExampleRows
from finsa.data.prompts import Prompt, with_target
from finsa.data.rows import Encoded, IntArray, LazyRows, Renderer, Row
from finsa.errors import DataError
from finsa.runs import progress
from finsa.session import Session


@dataclass(frozen=True)
class Labeled:
    """A data set as every method uses it, with or without a language model.

    Args:
        dataset: rows per split, labels, ledger.
        targets: whether the method reads the rows' targets, besides their texts.
        measures: what is reported besides accuracy and F1, see `finsa.evaluation.metrics.values`.
        cut: number of truncated texts per split; empty for a method that never truncates.
    """

    dataset: Dataset
    targets: bool = field(default=False, kw_only=True)
    measures: Mapping[str, Callable[..., float] | None] = field(default_factory=dict, kw_only=True)
    cut: dict[str, int] = field(default_factory=dict, kw_only=True)

    def texts(self, split: str) -> list[str]:
        """Texts of a split, with their targets if the method reads them."""
        rows = self.dataset.splits[split]
        return list(map(with_target, rows["target"], rows["text"])) if self.targets else rows["text"].to_list()

    def fixed(self, split: str) -> list[int]:
        """Number of leading characters of each text of a split, with its target, that are never truncated."""
        rows = self.dataset.splits[split]
        fixed = rows["fixed"].to_list() if "fixed" in rows.columns else [0] * rows.height
        if not self.targets:
            return fixed
        return [count + len(with_target(target, "")) for count, target in zip(fixed, rows["target"], strict=True)]

    def rationales(self) -> list[str]:
        """The thought before the answer of each training row; empty for a row without one."""
        rows = self.dataset.splits["train"]
        return rows["rationale"].fill_null("").to_list() if "rationale" in rows.columns else [""] * rows.height

    def gold(self, split: str) -> list[int]:
        """True classes of a split, as numbers."""
        return self.dataset.splits[split]["label"].to_list()

    def truth(self, split: str) -> NDArray[np.float64]:
        """True numbers of a split, (n, 1), or a 1 for each label that a row has, (n, c); see `values.VALUES`."""
        return values.matrix(self.dataset.splits[split], self.dataset.labels.outputs)

    @property
    def task(self) -> str:
        """The task of the data set."""
        return self.dataset.labels.task

    def truncated(self) -> dict[str, int]:
        """Number of truncated texts per split."""
        return self.cut

    def fingerprints(self) -> dict[str, str | None]:
        """Hashes of the prompt template (None without a language model) and of the labels."""
        labels = "\x1f".join([*self.dataset.labels.names, *self.dataset.labels.answers])
        return {"template_fingerprint": None, "label_fingerprint": _short_hash(labels)}

    def training_order(self, cfg: RunConfig) -> list[int]:
        """Numbers of the training rows that the method uses."""
        return sampling.choose(self.gold("train"), cfg.method, cfg.seed)


@dataclass(frozen=True)
class TokenizedDataset(Labeled):
    """A data set and the renderer that turns its texts into prompts.

    Args:
        dataset: rows per split, labels, ledger.
        renderer: of the run.
        prompt: prefix and suffix that the renderer puts around a text.
        cache: folder of cached tokens; None: tokens are not cached.
        examples: in every prompt; None: no examples.
        base_scores: log-probabilities of the test rows, (n, c), and the seconds of scoring them, by base model.
    """

    renderer: Renderer
    prompt: Prompt
    cache: str | None = None
    examples: ExampleRows | None = None
    base_scores: dict[str, tuple[NDArray[np.float64], float]] = field(default_factory=dict)
    _encoded: dict[str, Encoded] = field(default_factory=dict)

    def prompts(self, split: str) -> Encoded:
        """Prompts of a split, in the order of its rows; tokens are read from the cache if it has them."""
        if split not in self._encoded:
            texts = pl.Series(self.texts(split), dtype=pl.String)

            def build() -> dict[str, IntArray]:
                with progress.Display(progress.PREPARING).work(f"tokenizing {split} rows", len(texts)) as work:
                    return self.renderer.encode_texts(texts.to_list(), work.moved)

            if self.cache and len(texts) >= cache.MANY_TEXTS and self.prompt.examples_for is None:
                name = cache.key("tokens", cache.text_hash(texts), self.renderer.fingerprint())
                arrays = cache.arrays(cache.folder_of(self.cache, f"tokens-{name}"), build)
            else:
                arrays = build()
            self._encoded[split] = self.renderer.wrap(**arrays)
        return self._encoded[split]

    def truncated(self) -> dict[str, int]:
        """Number of truncated texts per split, of those encoded so far."""
        return {split: self._encoded[split].truncated for split in self.dataset.splits if split in self._encoded}

    def fingerprints(self) -> dict[str, str | None]:
        """Hashes of the prompt template and of the labels; only runs with equal ones are comparable."""
        template = f"{self.prompt.prefix}\x1f{self.prompt.suffix}\x1f{self.renderer.room}"
        if self.prompt.middle is not None:
            template += f"\x1f{self.prompt.middle}\x1f{self.prompt.target_first}"
        if self.examples is not None:
            template += f"\x1f{self.prompt.fixed_examples}\x1f{self.examples.settings.model_dump_json()}"
        return {**super().fingerprints(), "template_fingerprint": _short_hash(template)}

    def domains(self, split: str, experts: Sequence[str]) -> list[int]:
        """Number of the expert of each row's domain, (n,); -1 if the domain has no expert."""
        numbers = {name: number for number, name in enumerate(experts)}
        return [numbers.get(domain, -1) for domain in self.dataset.splits[split]["domain"].to_list()]

    def training_rows(self, cfg: RunConfig, experts: Sequence[str] = (), balance: str = "none") -> TrainingRows:
        """Rows to train on: sampled, weighted and with the loss mask of the method.

        Args:
            cfg: configuration of the run.
            experts: of a mixture, whose rows also have the span of the text and their domain.
            balance: how domains are balanced: none, downsample or oversample.
        """
        rule, weights = cfg.method.loss.class_weights, None
        if rule != "none":
            weights = sampling.class_weights(self.class_counts(cfg), rule, cfg.method.loss.beta)
        order = self.training_order(cfg)
        if balance != "none":
            domains = self.dataset.splits["train"]["domain"].to_list()
            draw = sampling.downsample if balance == "downsample" else sampling.oversample
            order = [order[row] for row in draw([domains[row] for row in order], cfg.seed)]
        domain = self.domains("train", experts) if experts else None
        truth = self.truth("train") if self.task in values.TASKS else None
        thoughts = None
        if cfg.model.think == "open":
            thoughts = [self.renderer.thought_ids(text, cfg.model.thought.max_tokens) for text in self.rationales()]
        return TrainingRows(
            self.renderer,
            self.prompts("train"),
            self.gold("train"),
            order,
            cfg.method,
            weights,
            domain,
            truth,
            thoughts=thoughts,
        )

    def class_counts(self, cfg: RunConfig) -> list[int]:
        """Number of training rows per class, among the rows that the method uses.

        Raises:
            ConfigError: for a class without rows, if the loss depends on class frequencies.
        """
        gold, names = self.gold("train"), self.dataset.labels.names
        return sampling.class_counts(gold, self.training_order(cfg), names, cfg.method.loss)


@dataclass(frozen=True)
class TrainingRows(LazyRows):
    """Training rows of a method.

    Args:
        renderer: builds a row from a prompt and its class.
        prompts: of the training split.
        gold: class of each of them.
        order: numbers of the rows that are used, in order.
        method: its head and ``loss_on`` determine the form of a row.
        weights: weight of the rows of each class; None: all are equal.
        domains: number of the expert of each row's domain; None: the rows are not for a mixture.
        truth: from `Labeled.truth`; None for tasks with one class per row.
        rejected: the wrong class of each row's pair, (n,); None: the method learns from no pairs.
        reference: log-probabilities of the classes by the model that training starts from, (n, c); None: not used.
        thoughts: tokens of the thought of each row; None: the prompt has no thoughts.
    """

    renderer: Renderer
    prompts: Encoded
    gold: list[int]
    order: list[int]
    method: Method
    weights: list[float] | None
    domains: list[int] | None = None
    truth: NDArray[np.float64] | None = None
    rejected: IntArray | None = None
    reference: NDArray[np.float64] | None = None
    thoughts: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.order)

    def row(self, at: int) -> Row:
        """Render one row, with its loss mask and weight."""
        prompt, label = self.prompts[self.order[at]], self.gold[self.order[at]]
        if self.method.head == "classifier":
            row = self.renderer.text_row(prompt, label)
        else:
            thought = None if self.thoughts is None else self.thoughts[self.order[at]]
            row = self.renderer.row(prompt, label, self.method.loss_on, thought)
        if self.truth is not None and self.method.loss_on == "label":
            row["values"] = self.truth[self.order[at]].tolist()
        if self.rejected is not None:
            row["rejected"] = int(self.rejected[self.order[at]])
        if self.reference is not None:
            row["reference"] = self.reference[self.order[at]].tolist()
        if self.weights is not None:
            row["weight"] = self.weights[label]
        if self.domains is not None:
            row["text_span"], row["domain"] = self.renderer.text_span(prompt), self.domains[self.order[at]]
        return row


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build(
    cfg: RunConfig,
    dataset: Dataset,
    tokenizer: Any,
    session: Session | None = None,
    examples: ExampleRows | None = None,
) -> TokenizedDataset:
    """Combine a data set and a tokenizer; jobs of a session with the same data and tokenizer share the tokens.

    Args:
        cfg: configuration of the run.
        dataset: its rows.
        tokenizer: of its model.
        session: of the command.
        examples: of the run that is evaluated; None: ``method.examples`` are chosen from the training rows.

    Raises:
        ConfigError: if prompt, labels and tokenizer are not compatible.
        DataError: if the part of a text that is never truncated leaves no room for the rest.
    """
    settings: tuple[object, ...] = (cfg.data.prompt, cfg.data.max_length, cfg.data.cache, cfg.model.prompt)
    settings += (cfg.model.think, cfg.model.thought)
    shots = cfg.method.examples
    measures = labeled_settings(cfg, session)["measures"]
    key: tuple[object, ...] = (id(dataset), id(tokenizer), *settings, *measures, cfg.evaluation.costs)
    if shots is not None:
        key += (shots, cfg.seed, id(examples))
    shared: dict[tuple[object, ...], Any] = session.tokenized if session else {}
    if key not in shared:
        if shots is not None and examples is None:
            rows = Labeled(dataset, **labeled_settings(cfg, session))
            examples = ExampleRows(shots, rows.texts("train"), rows.gold("train"), cfg.seed)
        style, think, marks = cfg.model.prompt, cfg.model.think, cfg.model.thought.marks
        prompt = Prompt.of(cfg.data.prompt, dataset.labels, style, think, tokenizer, examples, marks)
        renderer = Renderer(tokenizer, prompt, dataset.labels, cfg.data.max_length)
        built = TokenizedDataset(dataset, renderer, prompt, cfg.data.cache, examples, **labeled_settings(cfg, session))
        require_room(built, cfg.data)
        shared[key] = built
    tokenized: TokenizedDataset = shared[key]
    return tokenized


def labeled_settings(cfg: RunConfig, session: Session | None) -> dict[str, Any]:
    """Keyword arguments of `Labeled`, by the configuration: what is read of the rows, which measures are reported."""
    ordered = ("mae", "quadratic_kappa") if cfg.data.task == "ordinal" else ()
    names = dict.fromkeys((*(cfg.evaluation.metrics or ()), *ordered, cfg.train.select_by))
    measures = {name: None for name in names if name in get_args(Measure)}
    return {
        "targets": cfg.data.asks_for_target,
        "measures": {**measures, **_cost_measures(cfg), **(session.measures if session else {})},
    }


def _cost_measures(cfg: RunConfig) -> dict[str, Callable[..., float]]:
    """Mean cost of the predicted labels, and of the labels with the least expected cost, by ``evaluation.costs``."""
    if cfg.evaluation.costs is None:
        return {}
    table = np.array(cfg.evaluation.costs)

    def cost(true: IntArray, predicted: IntArray, _: NDArray[np.float64]) -> float:
        return float(table[true, predicted].mean())

    def least_cost(true: IntArray, _: IntArray, probs: NDArray[np.float64]) -> float:
        return float(table[true, (probs @ table).argmin(axis=1)].mean())

    return {"cost": cost, "least_cost": least_cost}


def require_room(tokenized: TokenizedDataset, data: Data) -> None:
    """Check that the instruction, or the earlier part of a chat, leaves room for the input in every row.

    Raises:
        DataError: with the number of rows and of tokens.
    """
    splits, room = tokenized.dataset.splits, tokenized.renderer.room
    found = {split: tokenized.renderer.crowded(tokenized.texts(split), tokenized.fixed(split)) for split in splits}
    counts = {split: len(rows) for split, rows in found.items() if rows}
    if not counts:
        return
    most = max(max(rows.values()) for rows in found.values() if rows)
    rows = sum(part.height for part in splits.values())
    where = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    kind = "the instruction leaves" if data.source == "alpaca" else "what comes before the last turn leaves"
    shorter = "shorten the instruction" if data.source == "alpaca" else "set data.turns=last"
    if data.source in ("table", "hub"):
        kind, shorter = "the target leaves", "shorten the targets"
    raise DataError(
        f"data.max_length: in {sum(counts.values()):,} of {rows:,} rows ({where}) {kind} no room for the input: it "
        f"needs up to {most:,} tokens, but only {room:,} are available. Only the input may be truncated. Set "
        f"data.max_length={data.max_length + most - room + 64} or more, or {shorter}"
    )
