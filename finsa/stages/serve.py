"""Serve predictions of a finished run or an export over HTTP, until a stop signal."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from finsa.config import ROOT, RunConfig, ServeStage, TrainStage, catalogue, demonstration
from finsa.data import dataset
from finsa.data.prompts import with_target
from finsa.data.schema import Reading
from finsa.errors import RunError
from finsa.evaluation import selective
from finsa.inference import predictor, receipts
from finsa.inference.predictor import Predictor
from finsa.runs import run_folder
from finsa.runs.run_folder import Result, RunFolder
from finsa.session import Session

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
WARM_UP = "公司上半年净利润同比增长三成，超出市场预期。"


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Bind the address, load the model and serve requests; on a stop signal, accepted requests are still answered.

    Raises:
        RunError: if packages or the token are missing, the address cannot be bound, or there is no such run.
    """
    session, stage = session or Session(), cfg.stage
    assert isinstance(stage, ServeStage)
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise RunError(f'stage=serve needs {", ".join(missing)}: pip install "finsa[serve]"')
    from finsa.serving import server  # packages of the extra `serve`

    token = server.token(stage.token_env)
    predictor.announce(f"run={cfg.run}")  # at once: even the packages of the service take a second to import
    from finsa.serving import application
    from finsa.serving.batching import Batcher
    from finsa.serving.middleware import Metrics

    with closing(server.bind(stage.host, stage.port if cfg.port is None else cfg.port)) as socket:
        source, address = _source(cfg, session), server.url(socket)
        record = predictor.for_inference(predictor.read(str(source)), cfg.model.inference)
        chosen = selective.of_run(stage, record.path, record.labels)
        remote = None
        if stage.backend == "openai":
            predictor.require_served(record)
            remote = predictor.served(record, stage)
        predictor.announce(record.name)
        with run_folder.start(cfg, None, session) as folder:
            if record.uses_torch and remote is None:
                from finsa.models import hardware  # torch takes seconds to import: after the checks

                hardware.prepare(cfg.train)
            model = remote or predictor.load(record, stage.batch_tokens, stage.threads, merge=True)
            model.selection = chosen[0] if chosen else None
            receipt = None
            if cfg.model.inference == "int8":
                texts, gold = receipts.validation_rows(record.cfg, session)
                receipt = receipts.quantize(model, texts or [WARM_UP], gold)
                folder.write_json(receipts.FILE, receipt)
                print(receipts.describe(receipt), flush=True)
            example = with_target("公司", WARM_UP) if record.cfg.data.asks_for_target else WARM_UP
            for copies in (1, stage.batch):
                model([example] * copies)
            served = {**_served(model, stage, folder), "receipt": receipt}
            folder.note(run=str(source), address=address, scoring=model.rule)
            metrics = Metrics(folder.path / "requests.jsonl", stage.log_bytes)
            batcher = Batcher(model, stage.batch, stage.wait_ms, stage.queue, metrics)
            read = _row_reader(model) if served["rows"] else None
            app = application.build(batcher, metrics, served, stage, token, read)
            greeting = f"serving {model.name} at {address}  (page: /  docs: /docs  stop: Ctrl-C)"
            server.Server(app, stage, metrics, lambda: print(greeting, flush=True)).run([socket])
    print(f"stopped; run folder: {folder.path}")
    return Result("serve", folder.path)


def _row_reader(model: Predictor) -> Callable[[dict[str, Any]], tuple[str, str | None]]:
    """A function that reads the text of a row as in training, and returns it with the reason if it cannot be used."""
    reading = Reading.of(model.cfg.data)

    def read(row: dict[str, Any]) -> tuple[str, str | None]:
        if reading.target and "text" in row:  # the page and simple clients need not know the names of the columns
            row = {reading.column: row["text"], reading.target: row.get("target"), **row}
        if not reading.fits(row):
            return "", f"has none of the fields text; {'; '.join(reading.fields)}"
        text, fault = model.check_room([reading.text_of(row)])[0]
        if fault is not None and reading.target and "target" in fault:
            fault = fault.replace(f"in the field '{reading.target}'", "in the field 'target'")
        return text, fault

    return read


def _source(cfg: RunConfig, session: Session) -> Path:
    """The folder to serve: the named one, the newest run, or a run of the defaults."""
    if cfg.run == "latest":
        return run_folder.latest(cfg.output_dir)
    if cfg.run != "default":
        return run_folder.read(str(cfg.run))[0]
    written = yaml.safe_load((catalogue.CONF / "stage" / "train.yaml").read_text(encoding="utf-8"))
    default = cfg.model_copy(update={"stage": TrainStage.model_validate(written), "run": None})
    fingerprint = dataset.load(default.data, session).fingerprint
    found = run_folder.finished(default, fingerprint)
    if found is None:
        print(
            f"run=default: no finished run of the defaults below {cfg.output_dir}, so one is trained first", flush=True
        )
        _train(cfg.output_dir, session)
        found = run_folder.finished(default, fingerprint)
    if found is None:
        raise RunError(
            "run=default: no run of the defaults was found after they were trained; train them with python run.py"
        )
    return found


def _train(output_dir: str, session: Session) -> None:
    """Train in a separate process, so that its memory is freed before serving."""
    quoted = output_dir.replace("\\", "\\\\").replace("'", "\\'")
    relevant = [text for text in session.overrides if text.lstrip("+~").startswith(("data", "train"))]
    checkout = ROOT / "run.py"  # not part of an installed package
    program = [str(checkout)] if checkout.is_file() else ["-m", "finsa"]
    words = [sys.executable, *program, f"output_dir='{quoted}'", "tracking=none", *relevant]
    if subprocess.run(words, check=False).returncode:
        raise RunError("run=default: training failed, see above")


def _served(model: Predictor, stage: ServeStage, folder: RunFolder) -> dict[str, Any]:
    """The response of ``/model``, without paths of this machine."""
    cfg, facts = model.cfg, model.facts
    base = {} if cfg.method.baseline is not None else cfg.model.model_dump(include={"name", "hub_id", "revision"})
    prints = ("config_hash", "data_fingerprint", "template_fingerprint", "label_fingerprint")
    return {
        "name": model.name,
        "run": model.path.name,
        "labels": list(model.labels),
        "experts": list(model.experts),
        "base": base,
        "demonstration": demonstration(cfg.model_dump(include={"model", "data", "method"})),
        "max_length": cfg.data.max_length,
        "rows": Reading.of(cfg.data).fields,
        "target": cfg.data.asks_for_target,
        "rule": model.rule,
        "fingerprints": {name.removesuffix("_fingerprint").removesuffix("_hash"): facts.get(name) for name in prints},
        "git_commit": facts.get("git_commit"),
        "versions": facts.get("versions", {}),
        "finsa": folder.facts["versions"]["finsa"],
        "limits": {"texts": stage.texts, "body_bytes": stage.body_bytes, "answer_seconds": stage.answer_seconds},
    }
