"""Check installed packages against the pinned versions, and against known vulnerabilities if the service is reachable.

    python tests/audit.py        part of `make lint`

Offline: every installed package of constraints.txt has the version pinned there, and `pip check` finds no conflict,
apart from packages that are meant to be installed without their dependencies.
With the advisory service: pip-audit checks the pins. If it is missing or cannot reach the service, that is reported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

ALONE = ("cntext",)  # installed with --no-deps: a word list of it is read, and nothing imported
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def pins(text: str) -> dict[str, str]:
    """Version by package, names as the index spells them."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def differing(wanted: dict[str, str]) -> list[str]:
    """Installed packages whose version differs from the pin, ignoring a local suffix such as +cpu."""
    lines = []
    for name, version in wanted.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # of an extra that is not installed, or of another platform
        if installed.partition("+")[0] != version.partition("+")[0]:
            lines.append(f"{name}: {installed} is installed, {version} is pinned")
    return lines


def conflicting(said: str) -> list[str]:
    """Lines of `pip check` that are conflicts."""
    expected = ("No broken requirements", *(f"{name} " for name in ALONE))
    return [line for line in said.splitlines() if line.strip() and not line.startswith(expected)]


def vulnerabilities() -> tuple[bool, str]:
    """Whether pip-audit found nothing or could not run, and the message."""
    if util.find_spec("pip_audit") is None:
        return True, "pip-audit is not installed, so known vulnerabilities were NOT looked for: pip install pip-audit"
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip"]
    options = ["--timeout", "10", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    try:
        known = json.loads(done.stdout)["dependencies"]
    except (ValueError, LookupError):
        if re.search(r"ConnectionError|Max retries|ServiceError|timed out|403|404", done.stderr):
            return True, "pip-audit cannot reach its advisory service, so known vulnerabilities were NOT looked for"
        return False, f"pip-audit:\n{done.stdout}{done.stderr}"
    return judged(known)


def judged(known: list[dict[str, Any]]) -> tuple[bool, str]:
    """Evaluate pip-audit's output; packages unknown to its service are skipped, though they may be unsafe."""
    bad = [
        f"{one['name']} {one['version']}: {', '.join(v['id'] for v in one['vulns'])}"
        for one in known
        if one.get("vulns")
    ]
    skipped = [one["name"] for one in known if "skip_reason" in one]
    if bad:
        return False, "\n".join(["pip-audit:", *bad])
    if len(skipped) == len(known):
        return True, "pip-audit's service knows none of the packages, so known vulnerabilities were NOT looked for"
    unknown = f"; NOT looked for in {', '.join(skipped)}" if skipped else ""
    return True, f"pip-audit: no known vulnerabilities in {len(known) - len(skipped)} packages{unknown}"


def main() -> int:
    """Print the findings; exit code 1 for a difference, a conflict or a vulnerability."""
    wanted = pins(CONSTRAINTS.read_text(encoding="utf-8"))
    wrong = differing(wanted)
    checked = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    conflicts = conflicting(checked.stdout)
    sound, said = vulnerabilities()
    print(*wrong, *(conflicts or ["pip check: no broken requirements"]), said, sep="\n")
    return int(bool(wrong) or bool(conflicts) or not sound)


if __name__ == "__main__":
    sys.exit(main())
