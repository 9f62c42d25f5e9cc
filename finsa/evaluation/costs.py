"""Cost of answers: seconds and money per 1,000 answers, and the configurations that no other one dominates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from finsa.config import LOWER_IS_BETTER, Section
from finsa.config.base import headline
from finsa.errors import ConfigError, Problem
from finsa.evaluation.finished_runs import RunGroup
from finsa.evaluation.tables import MISSING, TITLES, Table, format_value

Price = Annotated[float, Field(ge=0)]


class Prices(Section):
    """The file of ``stage.prices``.

    Args:
        currency: for tables and figures.
        devices: price per hour by device; a key is a part of the device's name in ``run.json``, such as ``H100``, or
            ``cpu``, which classical baselines use. The longest key that fits counts.
        runs: price per hour of the machine of a configuration, by its name in the report; instead of its device's.
    """

    currency: str = "USD"
    devices: dict[str, Price] = Field(default_factory=dict)
    runs: dict[str, Price] = Field(default_factory=dict)


def add(records: Sequence[dict[str, Any]], groups: Sequence[RunGroup], prices: Prices | None) -> None:
    """Add ``seconds_per_1000`` answers, ``money_per_1000`` and whether a configuration is ``pareto`` optimal.

    A configuration is optimal if no other one has a score at least as good at no higher cost, one of both better.

    Raises:
        ConfigError: if a device has no price.
    """
    task = groups[0].runs[0].task
    measure, cost = headline(task), "money_per_1000" if prices else "seconds_per_1000"
    sign = -1 if measure in LOWER_IS_BETTER else 1
    for record, group in zip(records, groups, strict=True):
        record["seconds_per_1000"] = seconds = record["milliseconds_per_row"]  # the same number
        if prices is not None:
            hourly = _per_hour(prices, group)
            record["money_per_1000"] = None if seconds is None else seconds * hourly / 3600
            record["currency"] = prices.currency
    known = [(sign * record[measure], -record[cost]) for record in records if record[cost] is not None]
    for record in records:
        own = (sign * record[measure], -(record[cost] or 0))
        beaten = any(one[0] >= own[0] and one[1] >= own[1] and one != own for one in known)
        record["pareto"] = None if record[cost] is None else not beaten


def _per_hour(prices: Prices, group: RunGroup) -> float:
    if group.name in prices.runs:
        return prices.runs[group.name]
    found = []
    for run in group.runs:
        device = str(run.facts.get("device") or "cpu")
        fitting = [key for key in prices.devices if key.lower() in device.lower()]
        if not fitting:
            text = f"has no price of the device '{device}' of {group.name}; add a part of its name to devices, or "
            raise ConfigError([Problem("stage.prices", f"{text}'{group.name}' to runs")])
        found.append(prices.devices[max(fitting, key=len)])
    return sum(found) / len(found)


def table(records: Sequence[dict[str, Any]], task: str) -> Table:
    """The table of a report."""
    money = next((record["currency"] for record in records if "currency" in record), None)
    names = [headline(task), "seconds_per_1000", *["money_per_1000"] * bool(money), "pareto"]
    rows = [[record["arm"], *(format_value(name, record[name]) or MISSING for name in names)] for record in records]
    columns = ["configuration", TITLES[names[0]], "seconds", *[str(money)] * bool(money), "Pareto-optimal"]
    caption = (
        "Per 1,000 answers: scoring of the test rows in batches, without loading the model, on the device of the run. "
        "Pareto-optimal: no other configuration is at least as good and costs no more."
    )
    return Table("Cost of 1,000 answers", columns, rows, caption, words=("Pareto-optimal",))
