"""A job on a Ray cluster: nodes are lost and join, and the bytes are those of one machine."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import held_chunks
import pytest
from processes_of_a_job import ENVIRONMENT, PICTURES, WAIT_SECONDS, begin, contents, ended

pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}
HOOK = {"runtime_env": {"worker_process_setup_hook": "held_chunks.hold"}}


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Iterator[Any]:
    """A cluster of one node, on this machine, whose actors wait where `held_chunks` says."""
    from ray.cluster_utils import Cluster

    known = {"PYTHONPATH": str(Path(__file__).parent), held_chunks.FOLDER: str(tmp_path)}
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    for name, value in {**ENVIRONMENT, **known, **quiet}.items():
        monkeypatch.setenv(name, value, prepend=":" if name == "PYTHONPATH" else None)
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def test_a_node_joins_and_is_lost(cluster, one_level_folder, undisturbed, tmp_path):
    ray = {"RAY_ADDRESS": cluster.address, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(HOOK)}
    with begin(one_level_folder, tmp_path / "out", "--engine", "ray", "--log-json", **ray) as run:
        try:
            said = (json.loads(line) for line in run.stdout if line.startswith("{"))  # Ray says of lost nodes its own

            def wait_for(event: str, **values: Any) -> None:
                assert any(line["event"] == event and values.items() <= line.items() for line in said), (
                    run.stderr.read()
                )

            wait_for("written")
            node = cluster.add_node(**NODE)
            wait_for("manned", by=2)
            held_chunks.free("joined")
            wait_for("written")
            cluster.remove_node(node, allow_graceful=False)
            wait_for("manned", by=1)
            held_chunks.free("lost")
            wait_for("summary", pictures=PICTURES, devices=1)
            _, warned = run.communicate(timeout=WAIT_SECONDS)
        finally:
            run.kill()
    assert run.returncode == 0
    assert "is lost: " in warned and "is lost: 0 chunks" not in warned
    assert contents(tmp_path / "out") == contents(undisturbed)


def test_what_nodes_cannot_share_is_refused(one_level_folder):
    [(status, said)] = ended(begin(one_level_folder, "memory://out", "--engine", "ray"))
    assert status == 2
    assert "each node has its own memory" in said
