"""A job on a Ray cluster: nodes are lost and join, and the bytes are those of one machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sdjax.batch import manifest

pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

JOB = ["--prompt", "goose", "--prompt", "blue goose", "--seeds", "0:150", "--steps", "20"]
CUT = ["--batch", "1", "--chunk-size", "2", "--log-json"]
NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}
ONE_DEVICE = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Any]:
    """A cluster of one node, on this machine."""
    from ray.cluster_utils import Cluster

    for name, value in {**ONE_DEVICE, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@contextmanager
def started(model: Path, out: Path | str, *engine: str, **environment: str) -> Iterator[subprocess.Popen]:
    call = [sys.executable, "-m", "sdjax", "batch", *JOB, *CUT]
    call += ["--model", str(model), "--out", str(out), *engine]
    environment = {**os.environ, **ONE_DEVICE, **environment}
    pipe = subprocess.PIPE
    with subprocess.Popen(call, env=environment, stdout=pipe, stderr=pipe, text=True) as run:
        try:
            yield run
        finally:
            run.kill()


def contents(folder: Path) -> dict[str, object]:
    """All files, those of the manifest without what varies."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name in [name for name in files if name.startswith(manifest.FOLDER)]:
        files[name] = [row | dict.fromkeys(manifest.VARYING) for row in manifest.load(files[name])]
    return files


def test_a_node_joins_and_is_lost(cluster, sd1_folder, tmp_path):
    with started(sd1_folder, tmp_path / "ray", "--engine", "ray", RAY_ADDRESS=cluster.address) as run:
        said = (json.loads(line) for line in run.stdout if line.startswith("{"))  # Ray says of lost nodes what it likes

        def wait_for(event: str, **values: Any) -> None:
            assert any(line["event"] == event and values.items() <= line.items() for line in said), run.stderr.read()

        wait_for("written")
        node = cluster.add_node(**NODE)
        wait_for("manned", by=2)
        wait_for("written")
        cluster.remove_node(node, allow_graceful=False)
        wait_for("manned", by=1)
        wait_for("summary", pictures=300, devices=1)
        _, warned = run.communicate(timeout=60)
    assert run.returncode == 0
    assert "is lost: " in warned
    with started(sd1_folder, tmp_path / "whole") as run:
        run.communicate(timeout=120)
    assert contents(tmp_path / "ray") == contents(tmp_path / "whole")


def test_what_nodes_cannot_share_is_refused(sd1_folder):
    with started(sd1_folder, "memory://out", "--engine", "ray") as run:
        _, said = run.communicate(timeout=60)
    assert run.returncode == 2
    assert "each node has its own memory" in said
