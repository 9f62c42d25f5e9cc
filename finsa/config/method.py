"""The section ``method``: which parameters are trained, on which rows, and with which loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from finsa.config.base import Balance, Fraction, Name, Section
from finsa.config.baselines import Baseline, Lexicon, Majority, TfidfLr


class Adapter(Section):
    """Low-rank matrices A and B added to frozen linear layers (Hu et al. 2021); the update is scaled by alpha / rank.

    Args:
        variant: ``dora`` also trains the magnitude of each output (Liu et al. 2024), ``rslora`` scales by
            alpha / sqrt(rank) (Kalajdzievski 2023), ``pissa`` starts from the largest singular vectors of the weights
            (Meng et al. 2024).
        targets: a named set of the model's ``lora_targets``, or a list of module names.
    """

    variant: Literal["lora", "dora", "rslora", "pissa"]
    rank: PositiveInt
    alpha: PositiveFloat
    dropout: Fraction
    targets: Literal["query_value", "attention", "all"] | Annotated[tuple[str, ...], Field(min_length=1)]
    lr_ratio: PositiveFloat
    init: str | None

    @model_validator(mode="after")
    def _check_init(self) -> Adapter:
        if self.init is not None and self.variant == "pissa":
            raise ValueError(
                "variant=pissa is initialized from the base model, so it cannot start from init; a finished PiSSA run "
                "is plain LoRA with twice the rank and alpha: set method.adapter.variant=lora"
            )
        return self


class Loss(Section):
    """The loss per token, or per row with loss_on=label.

    Args:
        class_weights: weight of a row by the number n of rows in its class: ``inverse``: 1 / n, ``effective``:
            (1 - beta) / (1 - beta^n).
        spread: of ``ordinal``: the target of a label at distance d from the true one is proportional to
            exp(-d / spread).
        delta: of ``huber``, for the output of a regression head: the difference at which the loss becomes linear.
    """

    name: Literal["cross_entropy", "focal", "adaptive_balanced", "ordinal", "huber"]
    gamma: NonNegativeFloat
    smoothing: Fraction
    spread: PositiveFloat
    delta: PositiveFloat
    class_weights: Literal["none", "inverse", "effective"]
    beta: Fraction
    logit_adjustment: NonNegativeFloat

    def needs_classes(self) -> str | None:
        """The setting that compares the classes of a row, as written on a command line; None if there is none."""
        if self.name != "cross_entropy":
            return f"loss.name={self.name}"
        changed = (name for name in ("smoothing", "logit_adjustment") if getattr(self, name) > 0)
        return next((f"loss.{name}={getattr(self, name)}" for name in changed), None)


class Examples(Section):
    """Labeled training rows in the prompt of a model that is not trained (few-shot).

    Args:
        count: number of examples in a prompt.
        choice: ``random``; ``balanced``: the classes take turns; ``nearest``: for each text the training rows with the
            most similar character n-grams (TF-IDF).
        max_characters: of an example's text; ``data.max_length`` does not count the examples.
        calibrate: subtract the log-probabilities that the labels have after content-free texts (contextual calibration,
            Zhao et al. 2021).
    """

    count: NonNegativeInt
    choice: Literal["random", "balanced", "nearest"]
    max_characters: PositiveInt
    calibrate: bool

    @model_validator(mode="after")
    def _check_calibration(self) -> Examples:
        if self.calibrate and self.choice == "nearest":
            raise ValueError("calibrate=true needs the same examples for all texts: set choice=balanced or random")
        return self


class Grpo(Section):
    """Reinforcement learning of thoughts (GRPO, Shao et al. 2024); their length and sampling are in ``model.thought``.

    Args:
        group: thoughts per row, whose rewards are compared with each other.
        reward: of a thought: ``log_prob``: log-probability of the true label among the labels after it; ``correct``: 1
            if the true label is the most probable one.
        form: additional reward of a thought that the model closes itself.
        beta: weight of the KL divergence from the base model; 0: none.
        vllm: generate with vLLM, as trl has it.
    """

    group: Annotated[int, Field(ge=2)]
    reward: Literal["log_prob", "correct"]
    form: NonNegativeFloat
    beta: NonNegativeFloat
    vllm: bool


class Preference(Section):
    """Training on pairs: the true label of a row, and a wrong one that the starting model prefers.

    The pairs are those of ``data.columns.rejected``. Without such a column, the rejected label of a row is the most
    probable wrong one, by models that were not trained on the row (out-of-fold), or by the base model with init=base.

    Args:
        loss: ``dpo`` (Rafailov et al. 2023), ``ipo`` (Azar et al. 2024) and ``kto`` (Ethayarajh et al. 2024) compare
            the model with the one that it started from; ``orpo`` (Hong et al. 2024) adds an odds ratio to the
            cross-entropy; ``simpo`` (Meng et al. 2024) compares mean log-probabilities per token.
        beta: of the loss, as in trl: the larger, the closer ``dpo``, ``ipo`` and ``kto`` stay to the starting model;
            weight of the odds ratio in ``orpo``; scale of the difference in ``simpo``.
        margin: of ``simpo``: by how much the true label has to win (gamma).
        folds: of the training rows; each is scored by a model that is trained on the others.
        mistakes_only: whether rows whose most probable label is the true one are left out.
    """

    loss: Literal["dpo", "ipo", "kto", "orpo", "simpo"]
    beta: PositiveFloat
    margin: NonNegativeFloat
    folds: Annotated[int, Field(ge=2)]
    mistakes_only: bool

    @property
    def compares(self) -> bool:
        """Whether the loss compares the model with the one that it started from."""
        return self.loss in ("dpo", "ipo", "kto")


class Reward(Section):
    """The expected reward of a label drawn from the model's probabilities, maximized exactly: no label is sampled.

    Args:
        kind: ``accuracy``: 1 for the true label, 0 for others; ``costs``: minus ``evaluation.costs``.
        beta: weight of the Kullback-Leibler divergence from the starting model.
    """

    kind: Literal["accuracy", "costs"]
    beta: NonNegativeFloat


class Method(Section):
    """What distinguishes a method from another one: trained parameters, training rows and loss.

    Args:
        init: where training starts: a finished run with an adapter, a folder of runs (the one of this seed with the
            best validation score), ``sweep`` (the same among the earlier jobs of the sweep), ``base`` (the base model).
            It must have been trained on the same labels and base model. null: the base model, for methods that need
            no other start.
        quantization: of the frozen base model: ``nf4``: 4-bit with double quantization (QLoRA, Dettmers et al. 2023),
            ``int8``: 8-bit (Dettmers et al. 2022).
    """

    name: Name
    learn: Literal["nothing", "head", "adapter", "all"]
    init: str | None
    adapter: Adapter | None
    quantization: Literal["none", "nf4", "int8"]
    head: Literal["lm", "classifier"]
    classifier_init: Literal["random", "label_words"]
    classifier_dropout: Fraction
    loss_on: Literal["all", "response", "label"]
    loss: Loss
    balance: Balance
    rows_per_class: PositiveInt | None
    baseline: Baseline | None
    examples: Examples | None
    grpo: Grpo | None
    preference: Preference | None
    reward: Reward | None

    @property
    def uses_torch(self) -> bool:
        """Whether its predictions need torch."""
        return not isinstance(self.baseline, Majority | Lexicon | TfidfLr)

    @property
    def starts_from_run(self) -> bool:
        """Whether training starts from what a run has trained."""
        return self.init not in (None, "base")

    @model_validator(mode="after")
    def _check_start(self) -> Method:
        if self.init == "":
            raise ValueError("init is empty; name a run, a folder of runs, or base")
        if self.starts_from_run and self.adapter is None:
            raise ValueError(f"init={self.init} is trained further as an adapter; start from method=lora_label")
        if self.starts_from_run and self.adapter is not None and self.adapter.variant == "pissa":
            raise ValueError("adapter.variant=pissa is initialized from the base model, so it cannot start from init")
        pairs, reward = self.preference, self.reward
        kind = f"preference.loss={pairs.loss}" if pairs else f"reward.kind={reward.kind}" if reward else None
        if kind is None:
            return self
        if pairs and reward:
            raise ValueError("preference and reward are two objectives; set one of them to null")
        if self.learn == "nothing" or self.loss_on != "label" or (pairs and self.head != "lm"):
            raise ValueError(
                f"{kind} trains the probabilities of the labels: set method.loss_on=label"
                f"{' and method.head=lm' if pairs else ''}, and a method that trains, such as method=lora_label"
            )
        if self.loss.name != "cross_entropy" or self.loss.needs_classes():
            raise ValueError(f"{kind} takes the place of method.loss; leave out {self.loss.needs_classes()}")
        if self.init is None and ((pairs and pairs.compares) or (reward and reward.beta > 0)):
            raise ValueError(
                f"{kind} compares the model with the one that it starts from: set method.init=<a finished run>, or "
                f"method.init=base for the base model{'' if pairs else ', or method.reward.beta=0'}"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> Method:
        if self.baseline is not None and (self.learn != "nothing" or self.quantization != "none"):
            raise ValueError(
                f"baseline.kind={self.baseline.kind} uses no language model: set method.learn=nothing "
                "method.adapter=null method.quantization=none, or method.baseline=null"
            )
        if self.examples is not None and (self.learn != "nothing" or self.baseline is not None):
            raise ValueError("examples are for a model that is not trained: method=few_shot, or method.examples=null")
        if self.grpo is not None and (self.learn != "adapter" or self.head != "lm"):
            raise ValueError("grpo trains an adapter of a model that answers in words; start from method=grpo")
        if self.learn == "adapter" and self.adapter is None:
            raise ValueError("learn=adapter needs an adapter section; start from method=lora")
        if self.learn != "adapter" and self.adapter is not None:
            raise ValueError(f"learn={self.learn} does not use an adapter; set method.adapter=null")
        if self.quantization != "none" and self.learn == "all":
            raise ValueError(
                f"quantization={self.quantization} freezes the base model, so learn=all cannot train it: "
                "choose method=qlora or method=lora_8bit, or set method.quantization=none"
            )
        if self.quantization != "none" and self.adapter is not None and self.adapter.variant == "pissa":
            raise ValueError("adapter.variant=pissa decomposes weights in full precision; set method.quantization=none")
        if self.head == "classifier" and self.learn == "nothing":
            raise ValueError("head=classifier must be trained: set method.learn=head to train the head alone")
        if self.head == "classifier" and self.loss_on != "label":
            raise ValueError("head=classifier predicts labels and no other token; set method.loss_on=label")
        if self.head == "lm" and self.learn == "head":
            raise ValueError("learn=head needs method.head=classifier")
        if self.head == "lm" and (self.classifier_init != "random" or self.classifier_dropout > 0):
            raise ValueError("classifier_init and classifier_dropout need method.head=classifier")
        compares = self.loss.needs_classes()
        weights = f"loss.class_weights={self.loss.class_weights}" if self.loss.class_weights != "none" else None
        if self.learn == "nothing" and (compares or weights):
            raise ValueError(
                f"learn=nothing trains nothing, so {compares or weights} has no effect; "
                "choose a method that trains, such as method=lora_focal"
            )
        if self.loss_on != "label" and compares:
            raise ValueError(
                f"{compares} compares the K labels of a row; set method.loss_on=label "
                f"(loss_on={self.loss_on} trains on tokens)"
            )
        return self
