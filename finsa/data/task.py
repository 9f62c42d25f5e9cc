"""A data set meets a tokenizer: prompts and rows of every split, made once per process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from finsa.config import RunConfig
from finsa.data import splits
from finsa.data.prompts import Prompt
from finsa.data.rows import Encoded, Renderer, Row
from finsa.data.table import Table


@dataclass(frozen=True)
class Task:
    """A table and the renderer that turns its texts into prompts.

    Args:
        table: rows per split, labels, ledger.
        renderer: the one renderer of this run.
        prompt: what the renderer puts around a text.
    """

    table: Table
    renderer: Renderer
    prompt: Prompt
    _encoded: dict[str, Encoded] = field(default_factory=dict)

    def prompts(self, split: str) -> Encoded:
        """Prompts of a split, in the table's order."""
        if split not in self._encoded:
            self._encoded[split] = self.renderer.encode(self.table.splits[split]["text"].to_list())
        return self._encoded[split]

    def truncated(self) -> dict[str, int]:
        """Rows whose text was cut, per split that was encoded so far."""
        return {split: self._encoded[split].truncated for split in self.table.splits if split in self._encoded}

    def gold(self, split: str) -> list[int]:
        """True classes of a split."""
        return self.table.splits[split]["label"].to_list()

    def fingerprints(self) -> dict[str, str]:
        """Hashes of the template and of the labels, to tell whether two runs can be compared."""
        template = f"{self.prompt.head}\x1f{self.prompt.tail}\x1f{self.renderer.room}"
        labels = "\x1f".join([*self.table.labels.names, *self.table.labels.words])
        return {"template_fingerprint": _short(template), "label_fingerprint": _short(labels)}

    def training_rows(self, cfg: RunConfig) -> list[Row]:
        """Rows to learn from: sampled as the method says, with loss where the method says."""
        prompts, gold = self.prompts("train").ids, self.gold("train")
        return [self.renderer.row(prompts[n], gold[n], cfg.method.loss_on) for n in self.training_order(cfg)]

    def training_order(self, cfg: RunConfig) -> list[int]:
        """Numbers of the training rows that the method uses."""
        gold = self.gold("train")
        return splits.downsample(gold, cfg.seed) if cfg.method.balance == "downsample" else list(range(len(gold)))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_tasks: dict[tuple[object, ...], Task] = {}


def build(cfg: RunConfig, table: Table, tokenizer: Any) -> Task:
    """Build a task; jobs of a sweep with the same data and tokenizer share it, its tokens included.

    Raises:
        ConfigError: where prompt, labels and tokenizer do not go together.
    """
    key = (id(table), id(tokenizer), cfg.data.prompt, cfg.data.max_length, cfg.model.prompt, cfg.model.think)
    if key not in _tasks:
        prompt = Prompt.of(cfg.data.prompt, table.labels, cfg.model.prompt, cfg.model.think, tokenizer)
        _tasks[key] = Task(table, Renderer(tokenizer, prompt, table.labels, cfg.data.max_length), prompt)
    return _tasks[key]
