"""`doctor --on slurm`: the checks on every node of a job, with something wrong on the nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.recipe.file import dump_yaml
from tests.support.commands import launch
from tests.support.slurm_cluster import SlurmCluster
from tests.support.small_recipe import small_values

pytestmark = pytest.mark.timeout(900)
PROFILE = {"partition": "low", "cpus_per_task": 1, "nodes": 2, "time": 60}
SETUP = ["ulimit -n 2000", "export WANDB_MODE=sometimes"]
"""What is wrong on the nodes, and not where the job is submitted."""


def test_every_node_is_checked(slurm: SlurmCluster, fashion_data: Path, tmp_path: Path) -> None:
    recipe, profile = tmp_path / "recipe.yaml", tmp_path / "cluster.yaml"
    recipe.write_text(dump_yaml({**small_values(fashion_data), "tracking": {"wandb": "auto"}}))
    profile.write_text(dump_yaml({**PROFILE, "setup": SETUP}))
    done = launch(tmp_path, "doctor", "recipe.yaml", "--on", "slurm", "--cluster", "cluster.yaml", deadline_s=800)
    assert done.code == 1, done.err
    first, *lines = done.out.splitlines()
    assert first.startswith("pass  SLURM: it answers: low (4 nodes), high (4 nodes)")
    by_node: dict[str, list[str]] = {}
    for host, _, line in (line.partition("  ") for line in lines):
        by_node.setdefault(host, []).append(line)
    assert len(by_node) == 2, done.out
    for results in by_node.values():
        faults = [line for line in results if not line.startswith("pass  ")]
        assert len(faults) == 2, done.out
        assert faults[0].startswith("warn  open files: 2000 may be open at once; Ray needs 4096; fix: slurm.setup: ['")
        assert faults[1].startswith("fail  wandb: WANDB_MODE = sometimes: wandb's mode is one of online, ")
        assert len(results) == 12, "9 checks of a machine, 2 of the recipe, the shared folder"
        assert f"pass  shared folder: {tmp_path} is the same here; what 2 nodes write there is seen" in results
        assert "pass  Ray: it starts, runs a task, and leaves no process" in results
    assert done.out.count("every byte is what was written") == 1, "one node reads the files"
    assert list(tmp_path.glob("hydra-doctor-*")) == [], "nothing is left"
