"""A run is read by the rule that it recorded, and by no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finsa import runs
from finsa.errors import RunError
from finsa.inference import answering, exporting

Trained = Callable[..., Path]


def test_another_rule_of_scoring_than_the_recorded_one_is_refused(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained("lora_response"), run)
    exporting.write(answering.read(str(run)), "adapter", "fp32", tmp_path / "export")
    for place, name in ((run, "run.json"), (tmp_path / "export", runs.EXPORTED)):
        assert answering.restore(str(place), 4096).rule == "whole label"
        facts = json.loads((place / name).read_text(encoding="utf-8"))
        assert facts["scoring"] == "whole label"
        facts["scoring"] = "whole label and end token"
        (place / name).write_text(json.dumps(facts), encoding="utf-8")
        with pytest.raises(
            RunError,
            match="by the rule 'whole label and end token', and here it would be 'whole label'.*repeat the run",
        ):
            answering.restore(str(place), 4096)
        del facts["scoring"]  # of an older version
        (place / name).write_text(json.dumps(facts), encoding="utf-8")
        assert answering.restore(str(place), 4096).rule == "whole label"
