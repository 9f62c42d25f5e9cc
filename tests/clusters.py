"""A real Ray cluster on this machine: two nodes, each with one core and an object store of its own.

python tests/clusters.py        start it, print its address and the process of its second node
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

STORE = 100_000_000  # bytes of a node's object store


@dataclass(frozen=True)
class Nodes:
    """A running cluster.

    Args:
        address: of its head, ``<host>:<port>``.
        second: process of the second node.
    """

    address: str
    second: int

    def kill_second(self) -> None:
        """Kill the second node at once, with its workers, as if its machine was lost."""
        import psutil

        node = psutil.Process(self.second)
        for process in (node, *node.children(recursive=True)):  # the node first, so that it starts no other worker
            process.send_signal(signal.SIGKILL)


def require_ray() -> None:
    """Skip the test where Ray is not installed, unless FINSA_REQUIRE_RAY=1."""
    if find_spec("ray") is None and os.environ.get("FINSA_REQUIRE_RAY") != "1":
        pytest.skip("Ray is not installed: pip install 'finsa[ray]'")


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """A cluster that this test alone uses."""
    words = [sys.executable, str(Path(__file__))]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if line.startswith("{")), None)
        assert line is not None, "the cluster has not started"
        yield Nodes(**json.loads(line))
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def main() -> None:
    """Start the cluster and wait."""
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    node = cluster.add_node(**options)
    second = node.all_processes["raylet"][0].process.pid
    print(json.dumps({"address": cluster.address, "second": second}), flush=True)
    sys.stdin.read()
    cluster.shutdown()
    time.sleep(0.1)


if __name__ == "__main__":
    main()
