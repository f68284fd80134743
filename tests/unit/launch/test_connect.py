"""A local driver ends with its Ray cluster: a real process of Ray's node object ends, without a cluster."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from ray._private import ray_constants

from launch.ray_cluster.connect import VITAL, _workers_here
from launch.ray_cluster.environment import RAY_ENDED
from tests.support.small_recipe import small_recipe

NODE = """
    import subprocess, threading
    from types import SimpleNamespace
    from ray._private.node import Node
    from launch.ray_cluster import connect
    process = subprocess.Popen(["false"])
    process.wait()
    node = SimpleNamespace(all_processes={KIND: [SimpleNamespace(process=process)]})
    node.dead_processes = lambda: Node.dead_processes(node)
    connect.ray_worker._global_node, connect.WATCH_S = node, 0.01
    watch = threading.Thread(target=connect._end_with_ray, args=(threading.Event(),), daemon=True)
    watch.start()
    watch.join(1)
    print("goes on")
"""


@pytest.mark.parametrize(
    ("kind", "code"), [("raylet", RAY_ENDED), ("gcs_server", RAY_ENDED), ("log_monitor", 0)], ids=str
)
def test_a_driver_ends_with_what_ray_cannot_do_without(kind: str, code: int) -> None:
    source = textwrap.dedent(NODE).replace("KIND", repr(kind))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert ("goes on" in done.stdout, f"Ray's {kind} ended" in done.stderr) == (code == 0, code != 0)


@pytest.mark.parametrize(("gpus", "count", "expected"), [(1, 2, 1), (3, 4, 2), (4, 4, 4), (8, 2, 2), (0, 4, 4)])
def test_with_auto_no_more_workers_start_than_there_are_gpus(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gpus: int,
    count: int,
    expected: int,
) -> None:
    """The largest legal number of them; on a machine without, the recipe's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    recipe = small_recipe(tmp_path, workers={"count": count, "device": "auto"})
    assert _workers_here(recipe) == expected
    changed = f"workers.count {count}: this machine has {gpus} GPU"
    assert (changed in caplog.text) == (expected != count)
    if expected != count:
        recipe = small_recipe(tmp_path, workers={"count": count, "device": "cuda"})
        with pytest.raises(ValueError, match=f"{changed}.*; lower workers.count"):
            _workers_here(recipe)


def test_they_are_called_what_ray_calls_them() -> None:
    assert {ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET} == set(VITAL)
