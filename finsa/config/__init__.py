"""The configuration: types by section, composition of ``conf/``, and checks of a command.

Values are in ``conf/``, where a comment beside each explains it; the types here define which values are allowed, and
their docstrings add what needs more than a line. Nothing here imports torch, so a wrong option is reported at once.
"""

from finsa.config.base import FOLDER_NAME, LOWER_IS_BETTER, ROOT, Section, locate, read_section
from finsa.config.baselines import (
    Baseline,
    BiLstm,
    Encoder,
    FromScratch,
    Lexicon,
    LinearProbe,
    Majority,
    Network,
    Polarity,
    TextCnn,
    TfidfLr,
)
from finsa.config.behavior import Behavior, BehaviorRule
from finsa.config.data import (
    Articles,
    Columns,
    Corpus,
    Csv,
    Data,
    Generator,
    Hub,
    Near,
    Policy,
    Split,
    SplitRows,
    data_title,
)
from finsa.config.method import Adapter, Examples, Grpo, Loss, Method, Preference, Reward
from finsa.config.model import LoraTargets, Model, Thought
from finsa.config.published import Pairs, Published, PublishedRow
from finsa.config.run import USED_BY, Evaluation, RunConfig, Tracking, demonstration
from finsa.config.stages import (
    AuditStage,
    AugmentStage,
    Axis,
    BehaveStage,
    BoardStage,
    CalibratedSelection,
    CascadeStage,
    ChainStage,
    CheckStage,
    CurveStage,
    Endpoint,
    EvaluateStage,
    ExportStage,
    GenerateStage,
    ImportStage,
    InspectStage,
    ListStage,
    MoeJointStage,
    NoiseStage,
    Paraphrase,
    PredictStage,
    PretrainStage,
    PushStage,
    RayCluster,
    ReportStage,
    RerunStage,
    Router,
    Scoring,
    SearchStage,
    Selection,
    Server,
    ServeStage,
    Stage,
    Synonyms,
    SynthesizeStage,
    TrainStage,
    WeightsPart,
    WeightsSource,
    WeightsStage,
)
from finsa.config.train import Train, divisor
