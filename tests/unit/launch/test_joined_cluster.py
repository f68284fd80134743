"""A driver that finds no Ray cluster asks for another one, instead of ending the job for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.ray_cluster import connect
from launch.ray_cluster.environment import write_token
from launch.slurm import joined_cluster
from launch.slurm.control_files import ControlFiles
from tests.support.small_recipe import small_recipe


def test_a_head_that_has_died_meanwhile_is_worth_another_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = ControlFiles.of(tmp_path, "12", "0")
    control.create()
    write_token(control.token)
    control.publish(0, "127.0.0.1:1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def refused(**arguments: Any) -> None:
        raise ConnectionError(f"no cluster at {arguments['address']}")

    monkeypatch.setattr(connect.ray, "init", refused)
    recipe = small_recipe(tmp_path, slurm={"nodes": 1, "cpus_per_task": 1, "time": 30, "signal_s": 30})
    with (
        pytest.raises(joined_cluster.NodesMissing, match=r"no cluster at 127\.0\.0\.1:1"),
        joined_cluster.joined_cluster(recipe, control, generation=0, hosts=["n1"]),
    ):
        pass
