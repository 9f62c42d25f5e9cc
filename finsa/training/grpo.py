"""Training of thoughts by group relative policy optimization (GRPO; Shao et al. 2024), on trl's GRPOTrainer.

For each row of a step, a group of thoughts is drawn; the reward of a thought is how probable it makes the true label.
Thoughts that are better than the mean of their group become more probable. The generation, the loss and the loop are
those of trl; prompts, rewards and validation are those of finsa.

Letters: b thoughts of a batch, c classes.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from finsa.config import RunConfig
from finsa.data.rows import Renderer
from finsa.data.tokenized import TokenizedDataset
from finsa.errors import FinsaError, Stopped
from finsa.inference import thinking
from finsa.inference.generation import ends_of
from finsa.inference.scoring import LabelScorer
from finsa.models.classifier import unwrap_peft
from finsa.runs import signals
from finsa.training import checkpoints
from finsa.training.fit import Fitted, Record, resume_from, shared_arguments
from finsa.training.watchdog import Watch

REFERENCE = "ref"  # the adapter that trl adds for the KL divergence


class ThoughtTrainer(GRPOTrainer):  # type: ignore[misc]
    """trl's trainer with finsa's prompts and validation. A prompt is the number of a training row.

    These private methods are overridden: `_tokenize_prompts`, because finsa's prompts are tokens already;
    `_generate_single_turn`, because trl cannot stop at text; `_save_checkpoint`, to seal a complete checkpoint.

    Args:
        prompts: token ids by row.
        renderer: of the prompts.
        validate: called with the model; its metrics select the checkpoint.
        resumed: checkpoint to resume from.
        log_file: file whose length is recorded in checkpoints.
        **kwargs: as GRPOTrainer takes them.
    """

    def __init__(
        self,
        *,
        prompts: Any,
        renderer: Renderer,
        validate: Callable[[torch.nn.Module], dict[str, float]],
        resumed: checkpoints.Checkpoint | None,
        log_file: Path | None,
        **kwargs: Any,
    ) -> None:
        self.prompts, self.validate, self.log_file, self.tokenizer = prompts, validate, log_file, renderer.tokenizer
        self.seconds_before, self.started = resumed.progress.seconds if resumed else 0.0, time.monotonic()
        self.validated: list[int] = []  # steps at which this process has validated
        assert renderer.prompt.thought is not None
        self.close = renderer.prompt.thought.close
        super().__init__(**kwargs)
        self.args.logging_nan_inf_filter = False  # it would hide losses that are not finite
        mark = self.tokenizer(self.close, add_special_tokens=False)["input_ids"]
        if len(mark) == 1 and not self.use_vllm:  # a mark of several tokens is found after generation
            self.eos_token_ids: list[int] = [*self.eos_token_ids, *mark]
            self.generation_config.eos_token_id = self.eos_token_ids

    @property
    def seconds(self) -> float:
        """Wall time of the training, including the time before it was resumed."""
        return self.seconds_before + time.monotonic() - self.started

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.prompts[int(row)] for row in prompts], None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], Any]:
        """Generate, and leave out what follows the closing mark: it does not change how probable the thought is."""
        completions, log_probs = super()._generate_single_turn(*args, **kwargs)
        ends = [self._end(ids) for ids in completions]
        if log_probs is not None:
            log_probs = [row[:end] for row, end in zip(log_probs, ends, strict=True)]
        return [ids[:end] for ids, end in zip(completions, ends, strict=True)], log_probs

    def _end(self, ids: list[int]) -> int:
        """Number of tokens up to the end of the closing mark; all of them without one."""
        lengths = range(1, len(ids) + 1)
        place = bisect_left(lengths, True, key=lambda length: self.close in self.tokenizer.decode(ids[:length]))
        return min(place + 1, len(ids))

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Validate with finsa's scorer."""
        self.validated.append(self.state.global_step)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validate(self.model).items()}
        self.log(dict(metrics))
        handler: Any = self.callback_handler
        self.control: Any = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        progress = checkpoints.Progress(
            over=False,
            tokens=int(self.state.num_input_tokens_seen),
            seconds=round(self.seconds, 3),
            open_loss=0.0,
            logged_loss=0.0,
            logged_step=self.state.global_step,
            log_bytes=self.log_file.stat().st_size if self.log_file and self.log_file.is_file() else 0,
        )
        checkpoints.seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}", progress)


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Displays steps with their reward, passes on every log record, and stops after a signal.

    Args:
        record: receives each log record with its step.
        watch: of the run.
        stopped: gives the signal that asks to save and stop; None while there is none.
    """

    def __init__(self, record: Record, watch: Watch, stopped: Callable[[], int | None]) -> None:
        self.record, self.display, self.stopped, self.shown = record, watch.display, stopped, ExitStack()
        self.work: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, at the step from which the run is resumed."""
        work = self.display.work("training", state.max_steps, done=state.global_step, at_once=True)
        self.work = self.shown.enter_context(work)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar; after a signal, ask for a checkpoint and the end."""
        self.work.move(state.global_step)
        if self.stopped() is not None:
            control.should_evaluate = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Display and pass on a record.

        Raises:
            FinsaError: for a loss that is not finite.
        """
        logs = dict(logs or {})
        logs.pop("train_loss", None)  # a mean over the steps of this process, not of a resumed run
        if not math.isfinite(logs.get("loss", 0.0)):
            text = f"training: the loss of step {state.global_step} is not finite. Checkpoints up to then are intact"
            raise FinsaError(f"{text}; lower train.learning_rate")
        shown = [f"{name} {logs[key]:.3f}" for name, key in (("reward", "reward"), ("KL", "kl")) if key in logs]
        if shown:
            self.work.note("  ".join(shown), "  ".join(shown))
        if "eval_loss" in logs:
            scores = "  ".join(f"{key.removeprefix('eval_')} {logs[key]:.4f}" for key in logs if "eval_" in key)
            where = f"step {state.global_step}/{state.max_steps}"
            self.display.console.print(f"  {where}  validation: {scores}", highlight=False)
        self.record(state.global_step, logs)


def rewards(cfg: RunConfig, data: TokenizedDataset, model: torch.nn.Module, ends: list[int]) -> list[Any]:
    """The reward functions: of the label after a thought, and of a thought that the model closes.

    Args:
        cfg: of the run.
        data: its training rows.
        model: that is trained; it also scores the labels.
        ends: tokens that end an answer.
    """
    grpo, thought, renderer = cfg.method.grpo, cfg.model.thought, data.renderer
    assert grpo is not None
    scorer, prompts, gold = (
        LabelScorer(model, renderer, cfg.train.score_tokens),
        data.prompts("train"),
        data.gold("train"),
    )

    def label(completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float]:
        """Log-probability of the true label among all labels, or whether it is the most probable one, (b,)."""
        thoughts = [thinking.read(ids, renderer, ends, thought.max_tokens) for ids in completion_ids]
        tokens = [renderer.thought_ids(one.text, thought.max_tokens) for one in thoughts]
        log_probs = scorer.score([*map(renderer.with_thought, [prompts[number] for number in row], tokens)])  # (b, c)
        true = [gold[number] for number in row]
        if grpo.reward == "correct":
            return (log_probs.argmax(axis=1) == true).astype(float).tolist()
        log_probs -= np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
        return log_probs[np.arange(len(true)), true].tolist()  # type: ignore[no-any-return]

    def form(completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Whether the model wrote the closing mark, (b,)."""
        return [float(thinking.read(ids, renderer, ends, thought.max_tokens).closed) for ids in completion_ids]

    return [label, form]


def fit(
    cfg: RunConfig,
    data: TokenizedDataset,
    model: Any,
    validate: Callable[[torch.nn.Module], dict[str, float]],
    folder: Path,
    record: Record,
    log: Path,
    watch: Watch,
) -> Fitted:
    """Train the thoughts of a model, and load its best checkpoint at the end.

    Args:
        cfg: of the run; a step has ``train.batch_size`` rows with a group of thoughts each.
        data: its rows.
        model: with an adapter.
        validate: computes the metrics that select the checkpoint.
        folder: of the checkpoints; training is resumed from an existing one.
        record: receives log records.
        log: the file that `record` appends to; it is truncated to its length at the checkpoint.
        watch: heartbeat and progress of the run.

    Raises:
        FinsaError: for a loss that is not finite; `Stopped` after a signal.
    """
    grpo, train = cfg.method.grpo, cfg.train
    assert grpo is not None
    resumed, order = resume_from(folder, log), data.training_order(cfg)
    dataset = Dataset.from_dict({"prompt": [str(number) for number in order], "row": order})
    patience = [EarlyStoppingCallback(train.patience)] if train.patience else []
    with signals.deferred() as stopped, watch.watching(), watch.stepping():
        reporter = Reporter(record, watch, stopped)
        trainer = ThoughtTrainer(
            model=model,
            reward_funcs=rewards(cfg, data, model, ends_of(model, data.renderer.end)),
            args=_arguments(cfg, len(order), folder, data.renderer),
            train_dataset=dataset,
            eval_dataset=dataset.select([0]),  # the trainer requires one; `validate` has the validation split
            processing_class=data.renderer.tokenizer,
            callbacks=[watch, reporter, *patience],
            prompts=data.prompts("train"),
            renderer=data.renderer,
            validate=watch.pausing(validate),
            resumed=resumed,
            log_file=log,
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        with reporter.shown:
            trainer.train(resume_from_checkpoint=str(resumed.path) if resumed else None)
        if (number := stopped()) is not None:
            raise Stopped(number, f"step {trainer.state.global_step} is saved")
    state, validated = trainer.state, trainer.validated
    if REFERENCE in getattr(model, "peft_config", {}):
        model.delete_adapter(REFERENCE)
    vars(unwrap_peft(model)).pop("forward", None)  # trl's, which the next run of the session would wrap again
    return Fitted(
        steps=state.global_step,
        best=state.best_metric if state.best_metric is not None and math.isfinite(state.best_metric) else None,
        best_validation=validated.index(step) if (step := state.best_global_step) in validated else None,
        seconds=trainer.seconds,
        tokens=int(state.num_input_tokens_seen),
        rows=state.global_step * train.batch_size,
        batching={},
        throughput={},
    )


def _arguments(cfg: RunConfig, rows: int, folder: Path, renderer: Renderer) -> GRPOConfig:
    train, grpo, thought = cfg.train, cfg.method.grpo, cfg.model.thought
    steps = max(1, math.ceil(rows // train.batch_size * train.epochs))  # trl drops an incomplete last step
    assert grpo is not None
    assert renderer.prompt.thought is not None
    more: dict[str, Any] = {}
    if grpo.vllm:
        close = {"stop": [renderer.prompt.thought.close], "include_stop_str_in_output": True}
        more |= {"use_vllm": True, "vllm_mode": "colocate", "generation_kwargs": close}
    return GRPOConfig(
        **shared_arguments(train, cfg.seed, folder),
        num_generations=grpo.group,
        max_completion_length=thought.max_tokens,
        temperature=thought.temperature,  # top_p stays 1: the loss assumes that thoughts are drawn from all tokens
        beta=grpo.beta,
        loss_type="grpo",
        reward_weights=[1.0, grpo.form],
        # transformers lets max_steps lengthen a training beyond its epochs; here it only shortens it
        max_steps=min(steps, train.max_steps or steps),
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=train.batch_size * grpo.group // train.micro_batch_size,
        **more,
    )
