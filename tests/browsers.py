"""A real browser (Debian's chromium), for tests of pages."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest


def chromium(reaches: str = "") -> Any:
    """Start chromium; without it, the test is skipped, or fails in CI.

    Args:
        reaches: the one host that it can reach; none: pages that need nothing else.
    """
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        message = "no chromium with chromedriver on this machine; on Debian: apt-get install chromium chromium-driver"
        if os.environ.get("FINSA_REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    resolves = "--host-resolver-rules=MAP * ~NOTFOUND" + (f", EXCLUDE {reaches}" if reaches else "")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", resolves):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
