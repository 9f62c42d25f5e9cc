"""Learning curve: runs on parts of the training rows, a power law of their errors, and what more rows would bring."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import numpy as np

from finsa.config import CurveStage, RunConfig, TrainStage
from finsa.data import dataset
from finsa.errors import ConfigError, FinsaError, Problem
from finsa.evaluation import figures, finished_runs, metrics, pages, power_law, statistics, tables
from finsa.evaluation.tables import Table
from finsa.runs import nested, run_folder
from finsa.runs.run_folder import Result
from finsa.session import Session
from finsa.training import preflight


def run(cfg: RunConfig, session: Session | None = None) -> Result:
    """Train on each part with each seed, or reuse the finished run; then fit, write and print the curve."""
    session, stage = session or Session(), cfg.stage
    assert isinstance(stage, CurveStage)
    data = dataset.load(cfg.data, session)
    preflight.require_trainable(cfg, data, session)
    rows, classes = data.splits["train"].height, len(data.labels)
    sizes = sorted({round(fraction * rows) for fraction in stage.fractions})
    if len(sizes) < 4 or sizes[0] < 2 * classes:
        text = (
            f"of {rows:,} training rows are {', '.join(map(str, sizes))} rows; a curve needs four sizes, the smallest "
        )
        raise ConfigError([Problem("stage.fractions", f"{text}with two rows per label")])
    configs = [_part(cfg, size if size < rows else None, cfg.seed + k) for size in sizes for k in range(stage.seeds)]
    for one in configs:
        preflight.require_trainable(one, dataset.load(one.data, session), session)

    # The runs are ordinary ones, in folders of their own, so that a repeated command finds those that finished.
    folders, own = [], session.with_own_folders()
    for number, one in enumerate(configs, start=1):
        fingerprint = dataset.load(one.data, session).fingerprint
        size = one.data.split.rows.train or rows
        one = one.model_copy(update={"resume": run_folder.unfinished(one, fingerprint) is not None})
        found = run_folder.finished(one, fingerprint)
        print(
            f"run {number} of {len(configs)}: {size:,} rows, seed {one.seed}{', finished before' if found else ''}",
            flush=True,
        )
        if found is None:
            printed = io.StringIO()
            try:
                with redirect_stdout(printed), redirect_stderr(printed):
                    found = nested.run(one, own).run_dir
            except FinsaError:
                print(printed.getvalue(), end="")
                raise
        assert found is not None
        folders.append(found)

    runs, _ = finished_runs.load(folders)
    at = np.repeat(np.array(sizes, dtype=float), stage.seeds)
    gold, predicted = runs[0].gold, np.array([one.predicted for one in runs])
    errors = 1 - metrics.averages(statistics.confusions(gold, predicted, classes))["macro_f1"]
    resampled = 1 - statistics.resampled(gold, predicted, classes, stage.draws, cfg.seed)["macro_f1"].T
    parameters = power_law.fit(at, errors)
    draws = power_law.bootstrap(at, errors, resampled, cfg.seed)
    expected = power_law.summarize(parameters, draws, rows)
    points = {size: (1 - errors[at == size]).tolist() for size in sizes}
    found_parameters = {name: float(value) for name, value in zip("abc", parameters, strict=True)}
    intervals = {name: metrics.percentiles(draws[:, place]) for place, name in enumerate("abc")}
    remarks = _remarks(expected, found_parameters, intervals)
    with run_folder.start(cfg, data.fingerprint, session) as folder:
        numbers: dict[str, Any] = {
            "macro_f1": {str(size): values for size, values in points.items()},
            "power_law": found_parameters,
        }
        numbers |= {"intervals": intervals, "expected": expected, "runs": [str(place) for place in folders]}
        folder.write_json("metrics.json", {"curve": numbers})
        grid = np.geomspace(sizes[0], 4 * rows, 80)
        band = 1 - np.percentile(power_law.predict(draws, grid), [97.5, 2.5], axis=0)
        line = 1 - power_law.predict(parameters, grid)
        figure = figures.learning_curve(points, grid, line, band, rows, folder.path / "curve.png")
        shown = [_points_table(points, parameters), _expected_table(expected)]
        facts = {"data": cfg.data.title, "fingerprint": data.fingerprint, "method": cfg.method.name}
        title = f"{cfg.method.name}, {cfg.data.title}: learning curve"
        folder.write_text("curve.html", pages.render(title, facts, remarks, [("Learning curve", shown, [figure])]))
    for table in shown:
        table.show()
    for sentence in remarks:
        tables.console().print(f"- {sentence}", markup=False, highlight=False)
    print(f"page: {folder.path / 'curve.html'}")
    return Result("curve", folder.path, {"curve": numbers})


def _part(cfg: RunConfig, size: int | None, seed: int) -> RunConfig:
    """The run on `size` training rows, drawn with the seed; None: on all of them, as without this stage."""
    changed = {"train": size, "seed": None if size is None else seed}
    split = cfg.data.split.model_copy(update={"rows": cfg.data.split.rows.model_copy(update=changed)})
    data = cfg.data.model_copy(update={"split": split})
    return cfg.model_copy(update={"data": data, "seed": seed, "stage": TrainStage(name="train", compare_base=False)})


def _remarks(
    expected: dict[str, dict[str, Any]], parameters: dict[str, float], intervals: dict[str, list[float]]
) -> list[str]:
    (now, at), (twice, doubled) = list(expected.items())[:2]
    gain, (low, high) = doubled["gain"], doubled["gain_interval"]
    law = ", ".join(
        f"{name} = {parameters[name]:.3g} ({ends[0]:.3g} to {ends[1]:.3g})" for name, ends in intervals.items()
    )
    return [
        f"Twice the training rows, {int(twice):,} instead of {int(now):,}, are expected to raise macro-F1 by "
        f"{gain:.4f} ({low:.4f} to {high:.4f}), from {1 - at['error']:.4f} to {1 - doubled['error']:.4f}.",
        f"The error is fitted by a + b n^-c: {law}. If the curve is nearly straight, a is hardly determined.",
        "Intervals of 95 % (bootstrap over runs and test rows) assume that the power law holds beyond the largest "
        "size, and that new rows are like these.",
    ]


def _points_table(points: dict[int, list[float]], parameters: np.ndarray) -> Table:
    rows = []
    for size, values in points.items():
        spread = f"{np.std(values, ddof=1):.4f}" if len(values) > 1 else tables.MISSING
        fitted = 1 - float(power_law.predict(parameters, [size])[0])
        rows.append([f"{size:,}", str(len(values)), f"{np.mean(values):.4f}", spread, f"{fitted:.4f}"])
    columns = ["training rows", "runs", "macro-F1", "standard deviation", "power law"]
    return Table("Macro-F1 on the test split by training rows", columns, rows, optional=(3, 1))


def _expected_table(expected: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for size, one in expected.items():
        error, (low, high), gain, (least, most) = one["error"], one["interval"], one["gain"], one["gain_interval"]
        cells = [f"{1 - error:.4f} ({1 - high:.4f}-{1 - low:.4f})", f"{gain:.4f} ({least:.4f}-{most:.4f})"]
        rows.append([f"{int(size):,}", *cells])
    return Table("Expected with more rows", ["training rows", "macro-F1", "gain"], rows, "95 % intervals.")
