"""Which runs can be exported in which format; without torch, so that an error is reported within a second."""

from __future__ import annotations

from finsa.config import MoeJointStage
from finsa.inference.predictor import Record

PRECISIONS = {"onnx": ("int8",), "gguf": ("f16", "q8_0")}  # besides fp32


def refusal(record: Record, form: str, precision: str) -> str | None:
    """Why the configuration of a run cannot be exported in a format; None if it can."""
    method, stage = record.cfg.method, record.cfg.stage
    if record.manifest:
        return f"{record.path} is itself an export; name the run that it was exported from"
    if record.members:
        return "a cascade consists of several runs; predict and serve read its run folder"
    if method.baseline is not None:
        return f"method={method.name} is not a language model; predict and serve read its run folder"
    if method.examples is not None and method.examples.choice == "nearest":
        return "its examples are chosen for each text; predict and serve read the run folder"
    if method.examples is not None and method.examples.calibrate:
        return "an export has no contextual calibration; predict and serve read the run folder"
    if record.cfg.model.think == "open" and form not in ("adapter", "merged"):
        return f"{form} computes scores and writes no thoughts (model.think=open); choose format=merged"
    if isinstance(stage, MoeJointStage) and form not in ("adapter", "merged"):
        return (
            f"{form} contains one set of weights, and a mixture selects among several for every text; format=adapter "
            "writes all experts with their router and a manifest, format=merged a model per expert, with hard routing"
        )
    if isinstance(stage, MoeJointStage) and form == "merged" and stage.router.read == "layer":
        return "its router reads an early layer of the base model, which merged experts change; choose format=adapter"
    if form == "adapter" and method.adapter is None and method.head == "lm":
        return f"method={method.name} trains no adapter; choose format=merged"
    if form == "adapter" and method.learn == "all":
        return f"method={method.name} trains all weights; choose format=merged"
    if form == "classifier" and method.head == "classifier":
        return (
            "its head reads the mean over the text, a sequence-classification model the last token; choose format=onnx"
        )
    if form == "gguf" and method.head == "classifier":
        return "llama.cpp has no classification head over the text; choose format=onnx"
    if precision not in ("fp32", *PRECISIONS.get(form, ())):
        used = next(name for name, known in PRECISIONS.items() if precision in known)
        return f"stage.precision={precision} is used by format={used} only; leave it out"
    return None
