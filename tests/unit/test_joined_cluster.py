"""A driver that finds no Ray cluster asks for another one, instead of ending the job for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch import cluster
from launch.control import Control
from launch.ray_settings import write_token
from tests.small_recipe import small_recipe


def test_a_head_that_has_died_meanwhile_is_worth_another_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = Control.of(tmp_path, "12", "0")
    control.create()
    write_token(control.token)
    control.publish(0, "127.0.0.1:1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def refused(**arguments: Any) -> None:
        raise ConnectionError(f"no cluster at {arguments['address']}")

    monkeypatch.setattr(cluster.ray, "init", refused)
    recipe = small_recipe(tmp_path, slurm={"nodes": 1, "cpus_per_task": 1, "time": 30, "signal_s": 30})
    with (
        pytest.raises(cluster.NodesMissing, match=r"no cluster at 127\.0\.0\.1:1"),
        cluster.joined_cluster(recipe, control, generation=0, hosts=["n1"]),
    ):
        pass
