"""What is said of gates: who is asked, how surely, and when a router has collapsed."""

from __future__ import annotations

import numpy as np
import pytest

from finsa.errors import DataError
from finsa.evaluation import router

NAMES = ("news", "forum")
GATES = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])


def test_counts_and_means() -> None:
    found = router.analysis(GATES, ["news", "news", "news", "forum"], NAMES)
    assert found["accuracy"] == 0.75
    assert found["accuracy_by_domain"] == {"news": pytest.approx(2 / 3), "forum": 1.0}
    assert found["confusion"] == {"news": {"news": 2, "forum": 1}, "forum": {"news": 0, "forum": 1}}
    assert found["load"] == {"news": pytest.approx(0.6), "forum": pytest.approx(0.4)}
    assert found["chosen"] == {"news": 0.5, "forum": 0.5}
    assert found["mean_gates"]["news"] == {"news": pytest.approx(0.7), "forum": pytest.approx(0.3)}
    assert found["warnings"] == []


def test_entropy_is_between_sure_and_uniform() -> None:
    sure = router.analysis(np.eye(2), NAMES, NAMES)
    assert (sure["entropy"], sure["load_entropy"]) == (pytest.approx(0, abs=1e-9), pytest.approx(1))
    assert router.analysis(np.full((3, 2), 0.5), [None] * 3, NAMES)["entropy"] == pytest.approx(1)


def test_domains_that_are_no_experts_have_no_right_one() -> None:
    found = router.analysis(GATES, ["weibo", "weibo", None, None], NAMES)
    assert found["accuracy"] is None
    assert set(found["confusion"]) == {"weibo", "(none)"}


def test_collapse_is_told() -> None:
    unused = router.analysis(np.array([[0.99, 0.01], [0.98, 0.02]]), NAMES, NAMES)["warnings"]
    assert any("Expert forum has fallen out of use" in warning for warning in unused)
    assert any("does not tell the domains apart" in warning for warning in unused)
    flat = router.analysis(np.array([[0.51, 0.49], [0.49, 0.51]]), NAMES, NAMES)["warnings"]
    assert len(flat) == 1


def test_an_unknown_domain(config: object) -> None:
    stage = config("stage=moe_joint").stage  # type: ignore[operator]
    router.require_known(stage, NAMES, ["news", None, "forum"])
    router.require_known(stage.model_copy(update={"domain_weight": 0.0}), NAMES, ["weibo"])
    with pytest.raises(DataError, match="domain 'weibo'"):
        router.require_known(stage, NAMES, ["news", "weibo"])
