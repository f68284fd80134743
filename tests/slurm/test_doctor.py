"""`doctor --on slurm`: the checks on every node of a job, one of them with a cause to fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.recipe.file import dump_yaml
from tests.support.commands import launch
from tests.support.slurm_cluster import SlurmCluster
from tests.support.small_recipe import small_values

pytestmark = pytest.mark.timeout(900)
PROFILE = {"partition": "low", "cpus_per_task": 1, "nodes": 2, "time": 60, "setup": ["ulimit -n 2000"]}


def test_every_node_is_checked(slurm: SlurmCluster, fashion_data: Path, tmp_path: Path) -> None:
    recipe, profile = tmp_path / "recipe.yaml", tmp_path / "cluster.yaml"
    recipe.write_text(dump_yaml(small_values(fashion_data)))
    profile.write_text(dump_yaml(PROFILE))
    before = set(tmp_path.iterdir())
    done = launch(tmp_path, "doctor", "recipe.yaml", "--on", "slurm", "--cluster", "cluster.yaml", deadline_s=800)
    assert done.code == 1, done.err
    first, *lines = done.out.splitlines()
    assert first.startswith("pass  SLURM: it answers: low (4 nodes), high (4 nodes)")
    host = lines[0].partition(" ")[0]
    by_check = {name: [line for line in lines if f"  {name}: " in line] for name in ("open files", "data", "GPUs")}
    fault = f"{host}  fail  open files: at most 2000 may be open at once, for good; Ray needs 4096"
    assert [line.startswith(fault) for line in by_check["open files"]] == [True, True]
    assert len([line for line in by_check["data"] if "every byte" in line]) == 1, "one node reads the files"
    assert by_check["GPUs"] == [f"{host}  pass  GPUs: not asked for: workers.device = cpu"] * 2
    others = [line for line in lines if "  open files: " not in line]
    assert [line for line in others if not line.startswith(f"{host}  pass  ")] == []
    assert len(others) == 2 * 11, done.out
    assert len([line for line in others if "  Ray: it starts, runs a task" in line]) == 2
    assert len([line for line in others if f"  shared folder: {tmp_path} is the same here; what 2" in line]) == 2
    assert set(tmp_path.iterdir()) == before, "nothing is left"
