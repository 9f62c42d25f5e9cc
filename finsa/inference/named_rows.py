"""Which rows an evaluation of a run scores: the run's own, or others that the command names."""

from __future__ import annotations

from finsa.config import Data, RunConfig, compose
from finsa.errors import ConfigError, Problem
from finsa.inference import predictor
from finsa.inference.predictor import Record
from finsa.session import Session

OF_THE_MODEL = ("labels", "prompt", "max_length")


def data_of(cfg: RunConfig, session: Session) -> Data:
    """The rows that an evaluation scores: its run's, or those that the command names."""
    return cfg.data if cfg.run is None else with_rows_of(cfg, predictor.read(cfg.run), session).data


def with_rows_of(cfg: RunConfig, record: Record, session: Session) -> RunConfig:
    """The configuration of a run; its rows may be others, if the command names some, or changes what they are read by.

    Raises:
        ConfigError: for a key that belongs to the model that was trained with it.
    """
    trained = record.cfg
    keys, direct = _said(session)
    changed = [key for key in keys if key.startswith("data.")]
    if "data" in keys or (changed and not direct):
        merged: Data = cfg.data.model_copy(update={key: getattr(trained.data, key) for key in OF_THE_MODEL})
        return trained.model_copy(update={"data": merged})
    fixed = [key for key in changed if key.split(".")[1] in OF_THE_MODEL]
    if fixed:
        text = f"belongs to the model, which was trained with that of its run ({record.path}); leave it out"
        raise ConfigError([Problem(key, text) for key in fixed])
    values, given = trained.model_dump(mode="json"), cfg.model_dump(mode="json")
    for key in changed:
        *sections, last = key.split(".")
        to, source = values, given
        for section in sections:
            to, source = to[section], source[section]
        if last in source:
            to[last] = source[last]
        else:  # ~data.hub.splits.validation
            to.pop(last, None)
    return compose.build(values, {}, []) if changed else trained


def _said(session: Session) -> tuple[list[str], bool]:
    """Keys of the command, and whether it is the evaluation's own: a chain's is that of all its links."""
    if session.job is None:
        return [], True
    keys = [word.lstrip("+~").partition("=")[0] for word in session.overrides]
    return keys, session.job.choices.get("stage") == "evaluate"
