"""Run several stages in sequence: every link is an ordinary run, which is reused when the chain is repeated."""

from __future__ import annotations

from dataclasses import replace

from finsa.config import ChainStage, RunConfig
from finsa.data import dataset
from finsa.errors import ConfigError, Problem
from finsa.runs import nested, starts
from finsa.runs.nested import REPEATED, configure
from finsa.runs.run_folder import Result
from finsa.session import Session


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Run the unfinished links; the result is that of the last link with test scores."""
    session = session or Session()
    assert isinstance(cfg.stage, ChainStage)
    links = cfg.stage.links
    if not links:
        raise ConfigError([Problem("stage.links", "names no stage; experiment=finsa_moe has some to look at")])
    # All links are checked first: an error in the last one should not cost the time of the others.
    for name in links:
        configure(cfg, name, {earlier: f"@{earlier}" for earlier in links}, session)
    done: dict[str, str] = {}
    last = Result("chain")
    session = session.with_own_folders()
    for number, name in enumerate(links, start=1):
        within = replace(session, own_data="data" in links[name])
        result = _link(configure(cfg, name, done, session), f"link {number} of {len(links)}, {name}", within)
        if result.run_dir is not None:
            done[name] = str(result.run_dir)
        last = result if "test" in result.metrics else last
    for name, folder in done.items():
        print(f"{name}: {folder}")
    return Result("chain", last.run_dir, last.metrics, last.objective)


def _link(cfg: RunConfig, title: str, session: Session) -> Result:
    """Run a link unless a finished run of it exists; an unfinished one is resumed with ``resume=true``."""
    cfg = starts.resolved(cfg, session)
    if cfg.stage.name in REPEATED:
        print(f"{title}: stage={cfg.stage.name}", flush=True)
        return nested.run(cfg.model_copy(update={"resume": False}), session)
    return nested.run_or_reuse(cfg, title, _fingerprint(cfg, session), session)


def _fingerprint(cfg: RunConfig, session: Session) -> str | None:
    """Fingerprint of the rows of a link; None for a stage that reads documents."""
    if cfg.stage.name == "pretrain":
        return None
    if cfg.stage.name == "evaluate":
        from finsa.inference import predictor  # it loads libraries that no other link may need

        return dataset.load(predictor.data_of(cfg, session), session).fingerprint
    return dataset.load(cfg.data, session).fingerprint
