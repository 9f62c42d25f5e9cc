"""Write labeled rows that a model generates from a prompt."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from finsa.config import RunConfig, SynthesizeStage
from finsa.data import dataset_writer
from finsa.data.endpoint import KEPT, Chat, Journal, Question
from finsa.data.labels import LabelSpace
from finsa.data.synthesize import Harvest, in_blocks
from finsa.errors import RunError
from finsa.runs.run_folder import Result
from finsa.session import Session

COLUMNS = ("id", "text", "label")


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Request rows of every class until there are enough, and write them to ``output``.

    Raises:
        RunError: if the output already exists, another process is writing it, the endpoint cannot be used, or there
            are too few rows after the last round.
    """
    with dataset_writer.claimed(cfg.output) as partial:
        return _write(cfg, partial)


def _write(cfg: RunConfig, partial: Path) -> Result:
    knobs = cfg.stage
    assert isinstance(knobs, SynthesizeStage)
    labels = LabelSpace.of(cfg.data, ())
    journal = Journal(partial / dataset_writer.ANSWERS)
    if journal.kept:
        print(f"resuming with {journal.kept:,} answers in {journal.file}")
    harvest = _harvest(knobs, labels, Chat(knobs, "stage", journal))
    splits = {"train": in_blocks(harvest.texts, 0, knobs.train, knobs.block, "train")}
    if knobs.validation:
        splits["validation"] = in_blocks(harvest.texts, knobs.train, harvest.wanted, knobs.block, "valid")
    folder = dataset_writer.publish(partial, splits, ("recipe.json", _recipe(cfg, labels, harvest)))
    rows = {split: part.height for split, part in splits.items()}
    print(f"{dict(harvest.counts)}\nwrote {rows} to {folder}")
    print(f"read them with: {dataset_writer.overrides(cfg.data, folder, COLUMNS)}")
    return Result("synthesize", None, {"rows": rows})


def _harvest(knobs: SynthesizeStage, labels: LabelSpace, chat: Chat) -> Harvest:
    """Request texts in rounds; each round requests the missing ones of all classes concurrently."""
    harvest = Harvest.of(labels.names, knobs.train + knobs.validation)
    asked = dict.fromkeys(labels.names, 0)
    for _ in range(knobs.rounds):
        questions = list[tuple[str, Question]]()
        for label in labels.names:
            prompt = knobs.prompt.format(label=label, labels="、".join(labels.names), count=knobs.block)
            blocks = math.ceil(harvest.missing(label) / knobs.block)
            questions += [(label, Question(prompt, asked[label] + number)) for number in range(blocks)]
            asked[label] += blocks
        answers = chat.ask([question for _, question in questions])
        for (label, _), answer in zip(questions, answers, strict=True):
            if answer.fault is None:
                harvest.add(label, answer.text)
            else:
                harvest.counts[answer.fault] += 1
        if not any(map(harvest.missing, labels.names)):
            return harvest
    short = ", ".join(f"{label} {len(texts)}" for label, texts in harvest.texts.items() if harvest.missing(label))
    raise RunError(
        f"stage.rounds: after {knobs.rounds} rounds there are fewer than {harvest.wanted} rows of {short} "
        f"({dict(harvest.counts)}). Set a higher stage.rounds or stage.temperature, or fewer rows. {KEPT}"
    )


def _recipe(cfg: RunConfig, labels: LabelSpace, harvest: Harvest) -> dict[str, Any]:
    return {
        "command": f"python run.py stage=synthesize data={cfg.data.name} output=<folder>",
        "stage": cfg.stage.model_dump(),
        "labels": list(labels.names),
        "counts": dict(harvest.counts),
    }
