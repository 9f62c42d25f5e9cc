"""Checks of the rows, prompt and schedule of a run that do not need torch, whose import takes seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from finsa.config import Data, RunConfig, Train, divisor
from finsa.config.base import COSTS, MEASURES
from finsa.data import dataset, prompts, sampling, tokenized, values
from finsa.data.dataset import Dataset
from finsa.data.tokenized import TokenizedDataset
from finsa.errors import ConfigError, DataError, Problem, counted
from finsa.models import folders, quantization, tokenizers
from finsa.runs import processes, run_folder, starts
from finsa.session import Session

MARKS = 16  # room for what closes a thought, which max_length and max_tokens do not count


def require_trainable(cfg: RunConfig, data: Dataset, session: Session, planned: bool = False) -> None:
    """Check that a configuration can be trained on a data set, or evaluated on it if nothing is trained.

    Args:
        cfg: of a language model or a baseline.
        data: its rows.
        session: of the command; the run reuses what is loaded here.
        planned: only a plan is printed, which uses the embedded tokenizer if that of the model is not available.

    Raises:
        ConfigError: for a missing library, or a batch size, class weights or a prompt that do not suit the rows.
        DataError: for an empty split, or rows without room for their text.
        ModelError: for a tokenizer that is not on this machine and cannot be downloaded.
    """
    zero_shot = cfg.method.learn == "nothing" and cfg.method.baseline is None
    examples = cfg.method.examples
    shots = ("train",) if examples is not None else ()
    data.require(*((*shots, "test") if zero_shot else ("train", "validation", "test")))
    rows = data.splits["train"].height
    if examples is not None and examples.count > rows and processes.is_main():
        text = f"is more than the {counted(rows, 'training row')}, all of which are examples of every prompt"
        print(f"note: method.examples.count={examples.count} {text}", flush=True)
    if cfg.method.baseline is not None:
        return
    if cfg.method.loss.name == "ordinal" and cfg.data.task != "ordinal":
        text = "is for labels with an order: set data.task=ordinal data.labels=[<lowest>,...,<highest>]"
        raise ConfigError([Problem("method.loss.name=ordinal", text)])
    if cfg.method.loss.name == "huber" and cfg.data.task != "regression":
        raise ConfigError([Problem("method.loss.name=huber", "is for task=regression; set data.task=regression")])
    _require_objective(cfg, data, session)
    if not zero_shot:
        _require_measure(cfg, data)
    if cfg.method.grpo is not None:
        thought = cfg.model.thought
        if cfg.model.think != "open" or thought.max_tokens == 0 or thought.temperature == 0:
            text = "trains thoughts that are drawn at random: set model.think=open, and model.thought.max_tokens and "
            raise ConfigError([Problem("method.grpo", f"{text}model.thought.temperature above 0")])
        if cfg.train.strategy != "single" or cfg.train.memory is not None:
            raise ConfigError([Problem("method.grpo", "runs in one process, without train.memory: leave both out")])
    if not zero_shot:
        gold = data.splits["train"]["label"].to_list()
        order = sampling.choose(gold, cfg.method, cfg.seed)
        counts = sampling.class_counts(gold, order, data.labels.names, cfg.method.loss)
        optimizer_steps(cfg.train, sum(counts), processes.world_size())
        if cfg.model.think == "open" and cfg.method.grpo is None:
            _note_rationales(cfg, data)
        elif cfg.data.columns.rationale is not None and processes.is_main():
            reason = "method=grpo trains on thoughts of the model" if cfg.method.grpo else "needs model.think=open"
            print(f"note: data.columns.rationale is not used: {reason}", flush=True)
    require_prompt(cfg, data, session, planned)


def _require_measure(cfg: RunConfig, data: Dataset) -> None:
    """Check that the measure that selects checkpoints is defined on the validation rows, for perfect predictions.

    Raises:
        ConfigError: otherwise.
    """
    name, rows = cfg.train.select_by, data.splits["validation"][: cfg.train.validation_rows]
    if name in ("loss", "macro_f1", "weighted_f1", "accuracy", *MEASURES["multi_label"], *COSTS) or not rows.height:
        return
    from finsa.evaluation import metrics, value_metrics  # imports scipy and scikit-learn, which take seconds

    if cfg.data.task in MEASURES:
        truth = values.matrix(rows, data.labels.outputs)
        value = value_metrics.values(cfg.data.task, truth, truth)[name]
    else:
        gold = rows["label"].to_numpy()
        value = metrics.values({name: None}, gold, np.log(np.eye(len(data.labels))[gold] * 0.8 + 0.1))[name]
    if math.isnan(value):
        kind = "the same number" if cfg.data.task == "regression" else "too few of the classes"
        text = f"is not defined on the {counted(rows.height, 'validation row')}, with {kind}; choose another measure"
        raise ConfigError([Problem(f"train.select_by={name}", text)])


def _note_rationales(cfg: RunConfig, data: Dataset) -> None:
    """Print how many training rows have no thought to train on.

    Raises:
        DataError: if none has one in the configured column.
    """
    column, rows = cfg.data.columns.rationale, data.splits["train"]
    missing = rows["rationale"].null_count()
    if column is not None and missing == rows.height:
        raise DataError(f"data.columns.rationale: no training row has a text in the column '{column}'")
    if missing and processes.is_main():
        print(f"note: {missing:,} of {rows.height:,} training rows have no rationale: trained with an empty thought")


def _require_objective(cfg: RunConfig, data: Dataset, session: Session) -> None:
    """Check the starting run, the costs of errors and the parts of out-of-fold scores against the rows."""
    costs, classes = cfg.evaluation.costs, len(data.labels)
    if costs is not None and len(costs) != classes:
        text = f"has {len(costs)} rows, and there are {classes} labels: {', '.join(data.labels.names)}"
        raise ConfigError([Problem("evaluation.costs", text)])
    if starts.pending(cfg):
        return

    def load(other: Data) -> Dataset:
        return dataset.load(other, session)

    starts.require_unseen_test_rows(cfg, data, load)
    pairs, found = cfg.method.preference, cfg.data.columns.rejected is None  # by scores of training rows
    if not cfg.method.starts_from_run:
        if pairs is not None and found:
            starts.require_unseen_training_rows(cfg, data, load)
        return
    starts.require_same_labels(cfg, data)
    if pairs is None or not found:
        return
    start = run_folder.read(str(cfg.method.init))[1]
    from_adapter = start.method.adapter is not None and start.method.adapter.init is not None
    if start.method.preference or start.method.reward or start.method.starts_from_run or from_adapter:
        text = (
            f"{cfg.method.init} started from a trained adapter itself (method={start.method.name}), so its mistakes on "
            "new rows cannot be found by training it again; start from a run of method=lora_response or lora_label, "
            "or give pairs in data.columns.rejected"
        )
        raise ConfigError([Problem("method.init", text)])
    starts.require_unseen_training_rows(start, data, load)
    texts = data.splits["train"]["text"].n_unique()
    least = data.splits["train"].height - -(-data.splits["train"].height // pairs.folds)
    if texts < pairs.folds or least < start.train.batch_size:
        text = (
            f"{pairs.folds} parts of {data.splits['train'].height} training rows leave {least} to train on, fewer than "
            f"a step of the starting run has (train.batch_size={start.train.batch_size})"
        )
        raise ConfigError([Problem("method.preference.folds", text)])


def require_prompt(cfg: RunConfig, data: Dataset, session: Session, planned: bool = False) -> None:
    """Check that prompt, labels and tokenizer are compatible, if the tokenizer can be read without torch.

    Args:
        cfg, data, session, planned: see `require_trainable`.

    Raises:
        ConfigError, DataError, ModelError: see `require_trainable`.
    """
    quantization.require_library(cfg.method)
    note = prompts.mismatch(cfg.data.prompt, [*data.labels.names, *data.labels.words])
    if note and processes.is_main():
        print(f"note: {note}", flush=True)
    if not planned:
        tokenizers.require_source(cfg.model)
    context = _context(cfg)
    if cfg.model.think == "open" and context is not None:
        _require_room_for_thoughts(cfg, context)
    tokenizer = tokenizers.load_without_torch(cfg.model)
    if tokenizer is None:
        return
    rows = tokenized.build(cfg, data, tokenizer, session)
    if context is not None and (cfg.method.examples is not None or cfg.data.max_length > context):
        _require_context(cfg, rows, context)
    if rows.prompt.thought is not None and cfg.data.columns.rationale is not None and cfg.method.learn != "nothing":
        mark, rationales = rows.prompt.thought.close, rows.rationales()
        if ending := sum(mark in text for text in rationales):
            raise DataError(
                f"data.columns.rationale: {ending:,} of {len(rationales):,} rationales contain {mark}, which ends a "
                "thought; remove it from them, or set other model.thought.marks"
            )


def _require_context(cfg: RunConfig, rows: TokenizedDataset, context: int) -> None:
    """Check that every prompt of the run, with its examples and its answer, fits into the context of the model.

    Raises:
        ConfigError: with both numbers of tokens, and what to lower.
    """
    read = ("test",) if cfg.method.learn == "nothing" else ("train", "validation", "test")
    prompt = max(int(rows.prompts(split).lengths.max(initial=0)) for split in read)
    longest = prompt + max(map(len, rows.renderer.answers)) + 1
    if longest > context:
        text = f"the longest prompt with its answer has {longest:,} tokens, but the context of the model is {context:,}"
        if cfg.method.examples is None:
            raise ConfigError([Problem("data.max_length", f"{text}; set data.max_length={context} or less")])
        fix = "set a smaller method.examples.count or method.examples.max_characters, or a smaller data.max_length"
        raise ConfigError([Problem("method.examples.count", f"{text}; {fix}")])
    if cfg.data.max_length > context and processes.is_main():
        text = f"is more than the context of the model, {context:,} tokens; no text of this data set is so long"
        print(f"note: data.max_length={cfg.data.max_length} {text}", flush=True)


def _context(cfg: RunConfig) -> int | None:
    """Number of positions of the model; None if its configuration is not on this machine."""
    file = Path(tokenizers.source_of(cfg.model)[0]) / folders.CONFIG
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else cfg.model.architecture or {}
    positions = known.get("max_position_embeddings") or known.get("n_positions")
    return positions if isinstance(positions, int) else None


def _require_room_for_thoughts(cfg: RunConfig, context: int) -> None:
    """Check that prompt, thought and answer fit into the positions of the model.

    Raises:
        ConfigError: with the longest thought that does.
    """
    prompt, thought = cfg.data.max_length, cfg.model.thought.max_tokens
    room = context - prompt - MARKS
    if thought > room:
        fix = f"set model.thought.max_tokens={room} or less" if room > 0 else "set a smaller data.max_length"
        text = (
            f"{thought:,} tokens after a prompt of up to {prompt:,} (data.max_length) fill the context of the model, "
        )
        raise ConfigError([Problem("model.thought.max_tokens", f"{text}which has {context:,} positions; {fix}")])


def optimizer_steps(train: Train, rows: int, world: int = 1) -> int:
    """Number of optimizer steps of a fit, including the incomplete last step of every epoch.

    Raises:
        ConfigError: if the batch size is larger than the number of rows.
    """
    if train.batch_size > rows:
        text = f"{train.batch_size} is more than the {rows} training rows. Set train.batch_size={rows} or less"
        raise ConfigError([Problem("train.batch_size", text)])
    micro_batches = -(-rows // (train.micro_batch_size * world))
    per_epoch = -(-micro_batches // accumulation_steps(train, world))
    return min(train.max_steps or 10**12, max(1, math.ceil(per_epoch * train.epochs)))


def accumulation_steps(train: Train, world: int = 1) -> int:
    """Number of micro-batches per optimizer step and process.

    Raises:
        ConfigError: if the batch size is not a multiple of processes and micro-batches.
    """
    per_process, rest = divmod(train.batch_size, train.micro_batch_size * world)
    if rest:
        text = (
            f"{train.batch_size} is not a multiple of micro_batch_size x processes: {train.micro_batch_size} x {world}"
        )
        if train.batch_size % world == 0:
            text += f"; set train.micro_batch_size={divisor(train.batch_size // world, train.micro_batch_size)}"
        raise ConfigError([Problem("train.batch_size", text)])
    return per_process
