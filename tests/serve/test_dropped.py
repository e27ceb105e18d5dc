"""Connections that are dropped leave nothing behind: scripts/drop_serve.py with fewer of them."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "drop_serve.py"


def test_dropped_connections_leave_nothing(served):
    spec = importlib.util.spec_from_file_location("drop_serve", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    before = script.settled(served.url, {"files": float("inf")})
    script.drop(served.url, 50)
    assert script.is_settled(before, script.settled(served.url, before))
    assert 'status="500"' not in script.metrics(served.url)
