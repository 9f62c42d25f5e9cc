"""The configuration of a run: all sections, the top-level keys, and rules across sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, field_validator, model_validator

from finsa.config.base import COSTS, MEASURES, Measure, Section
from finsa.config.baselines import Lexicon
from finsa.config.behavior import Behavior
from finsa.config.data import Data
from finsa.config.method import Method
from finsa.config.model import Model
from finsa.config.published import Published
from finsa.config.stages import MoeJointStage, Port, PushStage, Stage, SynthesizeStage
from finsa.config.train import Train

# Top-level keys that only some stages use; with other stages they would be ignored, so they are refused.
USED_BY = {
    "run": ("evaluate", "serve", "predict", "export", "push", "rerun", "behave"),
    "port": ("serve", "board"),
    "runs": ("report", "cascade", "behave", "check"),
    "behavior": ("behave",),
    "published": ("train", "evaluate", "check", "report"),
    "output": (
        "generate",
        "pretrain",
        "augment",
        "synthesize",
        "report",
        "predict",
        "export",
        "import",
        "audit",
        "behave",
    ),
    "input": ("predict", "import", "audit"),
    "text": ("predict",),
    "target": ("predict",),
    "format": ("export",),
    "resume": ("train", "evaluate", "pretrain", "search", "moe_joint", "chain", "noise"),
    "fresh": ("train", "evaluate"),
    "reuse_outdated": ("train", "evaluate", "moe_joint", "chain", "serve"),
}


class Tracking(Section):
    """Experiment tracking in addition to the run folder, which always has all metrics.

    Args:
        name: of the tracker.
        also: further trackers that receive the same.
    """

    name: Literal["wandb", "mlflow", "swanlab", "trackio", "tensorboard", "none"]
    also: tuple[Literal["wandb", "mlflow", "swanlab", "trackio", "tensorboard"], ...]
    project: str
    entity: str | None
    mode: Literal["auto", "online", "offline"]
    tags: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The trackers to log to, each once."""
        return [name for name in dict.fromkeys((self.name, *self.also)) if name != "none"]


class Evaluation(Section):
    """Measures that are reported besides accuracy and F1; null: none.

    Args:
        metrics: ``mcc``: Matthews correlation; ``balanced_accuracy``: mean recall of the classes; ``kappa``: Cohen's
            kappa, and ``quadratic_kappa`` for ordered classes; ``mae``: mean distance of ordered classes, in levels;
            ``jaccard``: macro average; ``auroc`` and ``average_precision``: each class against the others, macro
            average; ``log_loss``; ``brier``: sum over the classes.
        costs: what it costs to predict each label (column) for each true label (row), in the order of the labels. Then
            the mean ``cost`` of the predicted labels is reported, and ``least_cost``: that of the labels with the least
            expected cost under the predicted probabilities.
    """

    metrics: Annotated[tuple[Measure, ...], Field(min_length=1)] | None
    costs: tuple[tuple[NonNegativeFloat, ...], ...] | None

    @field_validator("costs")
    @classmethod
    def _check_costs(cls, costs: tuple[tuple[float, ...], ...] | None) -> tuple[tuple[float, ...], ...] | None:
        if costs is None:
            return None
        if len(costs) < 2 or any(len(row) != len(costs) for row in costs):
            raise ValueError("needs a row per true label with a cost per predicted label, such as [[0, 1], [2, 0]]")
        if any(row[number] != 0 for number, row in enumerate(costs)):
            raise ValueError("the true label must cost 0: the diagonal has another number")
        if not any(cost for row in costs for cost in row):
            raise ValueError("no error costs anything: a cost outside the diagonal has to be above 0")
        return costs


class RunConfig(Section):
    """The configuration of a run, validated once and immutable.

    Args:
        models: folder of model folders whose ``origin.json`` names the hub repository they were converted from, as
            written by stage=weights; models and encoders without a path are looked up there before the hub.
    """

    model: Model
    method: Method
    data: Data
    train: Train
    stage: Stage
    evaluation: Evaluation
    tracking: Tracking
    experiment: str | None
    sweep: dict[str, Annotated[tuple[str | int | float, ...], Field(min_length=1)]] | None
    per_method: dict[str, dict[str, Any]] | None
    seed: NonNegativeInt
    output_dir: str
    models: str | None
    run: str | None
    runs: str | tuple[str, ...] | None
    published: Published | None
    behavior: Behavior | None
    input: str | tuple[str, ...] | None
    text: str | None
    target: str | None
    format: Literal["merged", "adapter", "onnx", "classifier", "gguf"] | None
    output: str | None
    resume: bool
    fresh: bool
    reuse_outdated: bool
    port: Port | None

    @model_validator(mode="after")
    def _check_task(self) -> RunConfig:
        """Refuse methods, measures and stages that do not suit the task of the data."""
        task, method, stage = self.data.task, self.method, self.stage.name
        known, other = MEASURES.get(task), {name for names in MEASURES.values() for name in names} - {"macro_f1", "mae"}
        trains = stage in ("train", "check", "search", "noise", "curve")
        if trains and (self.train.select_by not in (*known, "loss") if known else self.train.select_by in other):
            options = f"set it to {', '.join(known)} or loss" if known else "leave it out"
            raise ValueError(f"train.select_by={self.train.select_by} is not a measure of task={task}; {options}")
        if trains and self.train.select_by in COSTS and self.evaluation.costs is None:
            raise ValueError(f"train.select_by={self.train.select_by} needs evaluation.costs")
        if known is None:
            return self
        if stage in ("moe_joint", "augment", "synthesize", "generate", "noise", "curve"):
            raise ValueError(f"stage={stage} needs one class per row, and this is task={task}")
        if self.evaluation.metrics is not None:
            raise ValueError(f"evaluation.metrics are for one class per row; task={task} has {', '.join(known)}")
        if self.evaluation.costs is not None:
            raise ValueError(f"evaluation.costs are for one class per row, and this is task={task}")
        if not trains:
            return self
        head, trained = method.head == "classifier", method.learn != "nothing"
        several, advice = task == "multi_label", ""
        if several and method.examples is not None:
            advice = "few-shot examples support one class per row; choose lora_label or tfidf_lr"
        elif isinstance(method.baseline, Lexicon):
            advice = "choose a method that learns from such rows, such as tfidf_lr"
        elif several and method.baseline is None and not head and self.data.answers is None:
            advice = "set data.answers, as in ['{label}: yes', '{label}: no'], or method=classifier"
        elif several and trained and method.loss_on != "label":
            advice = "choose method=lora_label, which asks for each label, or method=classifier"
        elif several and (method.balance, method.rows_per_class, method.loss.class_weights) != ("none", None, "none"):
            advice = "leave out method.balance, method.rows_per_class and method.loss.class_weights"
        elif (task == "regression" and head) != (method.loss.name == "huber"):
            advice = "choose method=regression_head, or method=lora_label, which compares words"
        elif method.classifier_init != "random" or (method.loss.needs_classes() and method.loss.name != "huber"):
            advice = f"leave out {method.loss.needs_classes() or 'method.classifier_init'}"
        elif method.preference or method.reward:
            advice = "choose method=lora_label; preferences and rewards are for one class per row"
        if advice:
            raise ValueError(f"method={method.name} does not suit data.task={task}; {advice}")
        return self

    @model_validator(mode="after")
    def _check_objective(self) -> RunConfig:
        """Refuse preferences, rewards and costs without what they need."""
        method, stage, rejected = self.method, self.stage.name, self.data.columns.rejected
        objective = "preference" if method.preference else "reward" if method.reward else None
        if stage in ("moe_joint", "pretrain") and (objective or method.starts_from_run):
            raise ValueError(f"method.{objective or 'init'} is for stage=train, not stage={stage}")
        if method.reward and method.reward.kind == "costs" and self.evaluation.costs is None:
            raise ValueError("method.reward.kind=costs needs evaluation.costs, a row of costs per true label")
        if rejected is not None and method.preference and method.preference.mistakes_only:
            raise ValueError(
                "method.preference.mistakes_only needs pairs that are found by scoring; leave out data.columns.rejected"
            )
        return self

    @model_validator(mode="after")
    def _check_stage(self) -> RunConfig:
        """Refuse a stage without what it needs, and keys that it does not use."""
        stage = self.stage.name
        if stage == "noise" and self.method.starts_from_run:
            raise ValueError(
                f"stage=noise scores rows by models that were not trained on them, and method={self.method.name} "
                "starts from a run that was; choose a method that starts from the base model"
            )
        if stage in ("noise", "curve") and self.train.strategy != "single":
            raise ValueError(f"stage={stage} trains in one process; set train.strategy=single")
        if stage == "pretrain" and self.data.corpus is None:
            raise ValueError("stage=pretrain reads documents; choose data=tiny_corpus or experiment=tiny_base")
        if stage == "evaluate" and self.run is None and self.method.baseline is not None:
            raise ValueError(
                f"method={self.method.name} must be trained before it can be scored; train it, then "
                "python run.py stage=evaluate run=<its run folder>"
            )
        if stage == "generate" and (self.data.generator is None or self.output is None):
            raise ValueError("stage=generate needs data=generated and output=<folder>")
        if stage == "import" and (self.input is None or self.output is None):
            raise ValueError("stage=import needs input=<a LLaMA-Factory YAML or dataset_info.json> output=<folder>")
        if stage in ("augment", "synthesize") and self.output is None:
            raise ValueError(f"stage={stage} needs output=<folder>")
        if isinstance(self.stage, SynthesizeStage) and (
            self.stage.model is None or (self.stage.write == "rows" and self.data.labels is None)
        ):
            raise ValueError(
                "stage=synthesize needs stage.model=<model>, and data.labels, as in data=openfindata_intent"
            )
        if stage == "serve" and self.run is None:
            raise ValueError(
                "stage=serve needs run=<a run folder or an export>, run=latest for the newest finished training run, "
                "or run=default for a run of the defaults, which is trained first if there is none"
            )
        if isinstance(self.input, tuple) and stage != "audit":
            raise ValueError(f"stage={stage} reads one input, not {len(self.input)}; only stage=audit takes a list")
        if stage == "audit" and not self.input:
            raise ValueError("stage=audit needs input=<file with answers> or input=[<file>,<file or run folder>]")
        if stage == "behave" and not self.runs and self.run is None:
            raise ValueError("stage=behave needs run=<folder> or runs=[<run folder>,<run folder>]")
        if stage == "report" and not self.runs and self.published is None:
            raise ValueError("stage=report needs runs=<folder of a sweep> or runs=[<run folder>,<run folder>]")
        if stage == "cascade" and (self.runs is None or isinstance(self.runs, str) or len(self.runs) < 2):
            raise ValueError("stage=cascade needs runs=[<cheap run>,<better run>]: two or more, the cheapest first")
        if self.run in ("latest", "default") and stage != "serve":
            raise ValueError(f"run={self.run} only works with stage=serve; give the folder of the run")
        if stage in ("predict", "export", "rerun") and self.run is None:
            raise ValueError(f"stage={stage} needs run=<folder>")
        if isinstance(self.stage, PushStage) and (self.run is None or self.stage.repo is None):
            raise ValueError("stage=push needs run=<folder> stage.repo=<owner>/<name>")
        if stage == "predict" and (self.text is None) == (self.input is None or self.output is None):
            raise ValueError('stage=predict needs input=<file or -> output=<file>, or text="..."')
        if self.target is not None and self.text is None:
            raise ValueError("target belongs to text=...; the rows of a file have a column with their targets")
        if stage == "export" and self.format is None:
            raise ValueError("stage=export needs format=merged, adapter, onnx, classifier or gguf")
        if self.train.memory is not None and stage in ("pretrain", "moe_joint"):
            raise ValueError(
                f"train.memory plans stage=train, not stage={stage}; leave it out and set train.micro_batch_size, "
                "which is halved if memory does not suffice"
            )
        if self.model.inference != "auto" and stage not in ("predict", "evaluate", "serve"):
            raise ValueError(
                f"model.inference is not used by stage={stage}, only by predict, evaluate, serve; leave it out"
            )
        for key, stages in USED_BY.items():
            if getattr(self, key) not in (None, False) and stage not in stages:
                raise ValueError(f"{key} is not used by stage={stage}, only by {', '.join(stages)}; leave it out")
        return self

    @model_validator(mode="after")
    def _check_mixture(self) -> RunConfig:
        """Refuse a mixture of experts without adapters that can be gated, or on a single domain."""
        if not isinstance(self.stage, MoeJointStage):
            return self
        if self.method.adapter is None:
            raise ValueError(
                f"stage=moe_joint mixes adapters, and method={self.method.name} has none; start from method=lora"
            )
        if self.method.adapter.variant == "dora":
            raise ValueError(
                "adapter.variant=dora has one magnitude per output, which belongs to a single update and cannot be "
                "gated; choose lora, rslora or pissa for a mixture"
            )
        if self.data.domain is not None:
            raise ValueError(
                f"stage=moe_joint uses all domains, and data.domain={self.data.domain} selects one; set "
                "data.domain=null, or data=finnf_joint for both parts of FinNF"
            )
        return self

    @model_validator(mode="after")
    def _check_thoughts(self) -> RunConfig:
        """Refuse thoughts where none can be written before an answer."""
        method, stage = self.method, self.stage.name
        thinks = self.model.think == "open" and method.baseline is None
        problem = None
        if thinks and method.head == "classifier":
            problem = "method.head=classifier reads the text and no thought"
        elif thinks and method.learn != "nothing" and method.loss_on == "label":
            problem = "method.loss_on=label trains no thought; choose method=lora_response"
        elif thinks and self.data.task == "multi_label":
            problem = "data.task=multi_label asks about each label, and a thought is about one answer"
        elif thinks and stage == "moe_joint":
            problem = "a mixture of experts writes no thoughts"
        elif thinks and self.train.strategy in ("fsdp", "deepspeed"):
            problem = f"train.strategy={self.train.strategy} cannot generate; choose ddp"
        if problem is not None:
            raise ValueError(f"model.think=open does not suit this run: {problem}; or set model.think=closed or none")
        return self

    @model_validator(mode="after")
    def _check_strategy(self) -> RunConfig:
        """Refuse methods that several processes cannot train with this strategy."""
        method, strategy = self.method, self.train.strategy
        if strategy != "single" and method.baseline is not None:
            raise ValueError(
                f"method={method.name} is a baseline and is trained in one process; set train.strategy=single and "
                "start it with python run.py"
            )
        if strategy in ("fsdp", "deepspeed") and method.quantization != "none":
            raise ValueError(
                f"train.strategy={strategy} shards weights, and weights with quantization={method.quantization} cannot "
                "be sharded; set train.strategy=ddp or method.quantization=none"
            )
        if strategy in ("fsdp", "deepspeed") and method.adapter is not None and method.adapter.variant == "pissa":
            raise ValueError(
                f"adapter.variant=pissa needs unsharded weights; set train.strategy=ddp instead of {strategy}"
            )
        return self


def demonstration(config: Mapping[str, Any]) -> str | None:
    """A disclaimer for runs of the embedded model or on synthetic rows; None for others.

    Args:
        config: of a run, as plain values.
    """
    model, data = config["model"], config["data"]
    embedded = model.get("path") == "data/tiny" and config["method"].get("baseline") is None
    generated = data.get("files") == "data/sample" or data.get("generator") is not None
    if embedded and generated:
        return "A demonstration: a tiny embedded model on generated rows. The scores say nothing about real texts."
    if generated:
        return "A demonstration: the rows are generated. The scores say nothing about real texts."
    return "A demonstration: the embedded model is too small for real use." if embedded else None
