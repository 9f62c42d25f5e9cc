"""A data set meets a tokenizer: prompts and rows of every split, made once per process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from finsa.config import Data, Method, RunConfig
from finsa.data import cache, sampling
from finsa.data.dataset import Dataset
from finsa.data.prompts import Prompt
from finsa.data.rows import Encoded, IntArray, Renderer, Row
from finsa.errors import DataError
from finsa.runs import progress
from finsa.session import Session

Crowded = Callable[[Sequence[str], Sequence[int]], dict[int, int]]


@dataclass(frozen=True)
class Labelled:
    """A table, and what every method asks of it.

    Args:
        dataset: rows per split, labels, ledger.
        cut: rows whose text is not read whole, per split; a method that reads texts whole leaves it empty.
    """

    dataset: Dataset
    cut: dict[str, int] = field(default_factory=dict, kw_only=True)

    def texts(self, split: str) -> list[str]:
        """Texts of a split."""
        return self.dataset.splits[split]["text"].to_list()

    def fixed(self, split: str) -> list[int]:
        """Leading characters of each text of a split that are never truncated."""
        rows = self.dataset.splits[split]
        return rows["fixed"].to_list() if "fixed" in rows.columns else [0] * rows.height

    def gold(self, split: str) -> list[int]:
        """True classes of a split."""
        return self.dataset.splits[split]["label"].to_list()

    def truncated(self) -> dict[str, int]:
        """Rows whose text was cut, per split."""
        return self.cut

    def fingerprints(self) -> dict[str, str | None]:
        """Hashes of the template (without a language model there is none) and of the labels."""
        labels = "\x1f".join([*self.dataset.labels.names, *self.dataset.labels.words])
        return {"template_fingerprint": None, "label_fingerprint": _short(labels)}

    def training_order(self, cfg: RunConfig) -> list[int]:
        """Numbers of the training rows that the method uses."""
        return sampling.chosen(self.gold("train"), cfg.method, cfg.seed)


@dataclass(frozen=True)
class TokenizedDataset(Labelled):
    """A table and the renderer that turns its texts into prompts.

    Args:
        dataset: rows per split, labels, ledger.
        renderer: the one renderer of this run.
        prompt: what the renderer puts around a text.
        cache: folder where tokens are kept; None: nowhere.
        base_scores: of the test rows, (n, c), by the base model that has scored them.
    """

    renderer: Renderer
    prompt: Prompt
    cache: str | None = None
    base_scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    _encoded: dict[str, Encoded] = field(default_factory=dict)

    def prompts(self, split: str) -> Encoded:
        """Prompts of a split, in the table's order; their tokens come from the cache where they are in it."""
        if split not in self._encoded:
            texts = self.dataset.splits[split]["text"]

            def build() -> dict[str, IntArray]:
                with progress.Display(progress.PREPARING).work(f"tokenizing {split} rows", len(texts)) as work:
                    return self.renderer.encode_texts(texts.to_list(), work.moved)

            if self.cache and len(texts) >= cache.MANY_TEXTS:
                name = cache.key("tokens", cache.text_hash(texts), self.renderer.fingerprint())
                arrays = cache.arrays(cache.folder_of(self.cache, f"tokens-{name}"), build)
            else:
                arrays = build()
            self._encoded[split] = self.renderer.wrap(**arrays)
        return self._encoded[split]

    def truncated(self) -> dict[str, int]:
        """Rows whose text was cut, per split that was encoded so far."""
        return {split: self._encoded[split].truncated for split in self.dataset.splits if split in self._encoded}

    def fingerprints(self) -> dict[str, str | None]:
        """Hashes of the template and of the labels, to tell whether two runs can be compared."""
        template = f"{self.prompt.prefix}\x1f{self.prompt.suffix}\x1f{self.renderer.room}"
        return {**super().fingerprints(), "template_fingerprint": _short(template)}

    def domains(self, split: str, experts: Sequence[str]) -> list[int]:
        """For each row of a split the number of the expert whose domain it is; -1 where it is none's."""
        number = {name: place for place, name in enumerate(experts)}
        return [number.get(domain, -1) for domain in self.dataset.splits[split]["domain"].to_list()]

    def training_rows(self, cfg: RunConfig, experts: Sequence[str] = (), balance: str = "none") -> TrainingRows:
        """Rows to learn from: sampled and weighted as the method says, with loss where the method says.

        Args:
            cfg: its method says it.
            experts: of a mixture, whose rows also tell their text's place and their domain.
            balance: of the domains: none, downsample or oversample.
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
        return TrainingRows(
            self.renderer, self.prompts("train"), self.gold("train"), order, cfg.method, weights, domain
        )

    def class_counts(self, cfg: RunConfig) -> list[int]:
        """Training rows per class, of the rows that the method uses.

        Raises:
            ConfigError: for a class without rows, where the loss needs its share.
        """
        gold, names = self.gold("train"), self.dataset.labels.names
        return sampling.class_counts(gold, self.training_order(cfg), names, cfg.method.loss)


@dataclass(frozen=True)
class TrainingRows(Sequence[Row]):
    """Training rows, put together when they are asked for.

    Args:
        order: numbers of the rows that are used.
        method: where the loss is.
        weights: how much a class's rows count; None: all the same.
        domains: number of the expert whose domain a row is; None: rows for no mixture.
    """

    renderer: Renderer
    prompts: Encoded
    gold: list[int]
    order: list[int]
    method: Method
    weights: list[float] | None
    domains: list[int] | None = None

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        """One row, or a list of them."""
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        prompt, label = self.prompts[self.order[at]], self.gold[self.order[at]]
        if self.method.head == "classifier":
            row = self.renderer.text_row(prompt, label)
        else:
            row = self.renderer.row(prompt, label, self.method.loss_on)
        if self.weights is not None:
            row["weight"] = self.weights[label]
        if self.domains is not None:
            row["text_span"], row["domain"] = self.renderer.text_span(prompt), self.domains[self.order[at]]
        return row


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build(cfg: RunConfig, table: Dataset, tokenizer: Any, session: Session | None = None) -> TokenizedDataset:
    """Build a task; jobs of a sweep with the same data and tokenizer share it, its tokens included.

    Raises:
        ConfigError: where prompt, labels and tokenizer do not go together.
        DataError: where the part of a text that is never truncated leaves no room for the rest.
    """
    settings = (cfg.data.prompt, cfg.data.max_length, cfg.data.cache, cfg.model.prompt, cfg.model.think)
    key = (id(table), id(tokenizer), *settings)
    shared: dict[tuple[object, ...], Any] = session.tokenized if session else {}
    if key not in shared:
        prompt = Prompt.of(cfg.data.prompt, table.labels, cfg.model.prompt, cfg.model.think, tokenizer)
        renderer = Renderer(tokenizer, prompt, table.labels, cfg.data.max_length)
        made = TokenizedDataset(table, renderer, prompt, cfg.data.cache)
        require_room(made, renderer.crowded, renderer.room, cfg.data)
        shared[key] = made
    tokenized: TokenizedDataset = shared[key]
    return tokenized


def require_room(job: Labelled, crowded: Crowded, room: int, data: Data) -> None:
    """Check that no instruction, and no earlier part of a chat, pushes the input out of the text.

    Args:
        job: whose texts are checked.
        crowded: finds texts whose fixed part leaves no room; `Renderer.crowded`, or the same of another tokenizer.
        room: tokens for a text.
        data: names the settings.

    Raises:
        DataError: with the number of rows and of tokens.
    """
    found = {split: crowded(job.texts(split), job.fixed(split)) for split in job.dataset.splits}
    counts = {split: len(rows) for split, rows in found.items() if rows}
    if not counts:
        return
    most = max(max(rows.values()) for rows in found.values() if rows)
    rows = sum(part.height for part in job.dataset.splits.values())
    where = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    kind = "the instruction leaves" if data.source == "alpaca" else "what comes before the last turn leaves"
    shorter = "shorten the instruction" if data.source == "alpaca" else "set data.turns=last"
    raise DataError(
        f"data.max_length: in {sum(counts.values()):,} of {rows:,} rows ({where}) {kind} no room for the input: it "
        f"takes up to {most:,} tokens, and the text may have {room:,}. Only the input may be truncated. Set "
        f"data.max_length={data.max_length + most - room + 64} or more, or {shorter}"
    )
