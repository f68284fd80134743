"""What sbatch is given for the common shapes of clusters, judged by the test cluster's own sbatch where it can."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from launch.slurm import REPORT, sbatch_text
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from tests.slurm_cluster import SlurmCluster

DEMO = Path(__file__).parents[2] / "recipes" / "fashion_mnist.yaml"
COMMON = ["slurm.time=1:00:00", "slurm.cpus_per_task=2"]


def recipe_with(*overrides: str) -> Recipe:
    return load_recipe(DEMO, [*COMMON, *overrides])


def options_of(text: str) -> dict[str, str]:
    """--name -> value, as the file says them."""
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE)
    assert len({name for name, _ in found}) == len(found), "an option is there twice"
    return dict(found)


SHAPES = {
    "gpus per node": ["slurm.gpus_per_node=2", "slurm.nodes=2"],
    "gres": ["slurm.gres=gpu:2", "slurm.workers_per_node=2"],
    "a constraint": ["slurm.constraint=a100", "slurm.nodes=1-2"],
    "memory and partition": ["slurm.mem=1G", "slurm.partition=high"],
    "mail and more options": ["slurm.mail_user=a@b.org", "slurm.mail_type=END,FAIL", "slurm.options={nice: '100'}"],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_sbatch_accepts_it(slurm: SlurmCluster, tmp_path: Path, shape: str) -> None:
    file = tmp_path / "job.sh"
    file.write_text(sbatch_text(recipe_with(*SHAPES[shape]), tmp_path / "runs" / "a b", "pretrain"))
    done = subprocess.run(["sbatch", "--test-only", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


@pytest.mark.parametrize(
    "impossible", [["slurm.gpus_per_node=99"], ["slurm.constraint=quantum"], ["slurm.partition=none"]]
)
def test_sbatch_can_refuse(slurm: SlurmCluster, tmp_path: Path, impossible: list[str]) -> None:
    """So that the acceptance above means something."""
    file = tmp_path / "job.sh"
    file.write_text(sbatch_text(recipe_with(*impossible), tmp_path / "run", "pretrain"))
    done = subprocess.run(["sbatch", "--test-only", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0


def test_options_say_what_the_recipe_says(tmp_path: Path) -> None:
    text = sbatch_text(
        recipe_with("slurm.nodes=1-4", "slurm.gpus_per_node=8", "slurm.signal_s=90"), tmp_path, "pretrain"
    )
    options = options_of(text)
    assert options["nodes"] == "1-4"
    assert options["gpus-per-node"] == "8"
    assert options["ntasks-per-node"] == "1"
    assert options["time"] == "60"
    assert options["signal"] == "USR2@90"
    assert "requeue" in options
    assert "--cpus-per-task=2" in text.partition("\nsrun ")[2]


def test_the_report_needs_one_node_and_no_gpu(tmp_path: Path) -> None:
    options = options_of(sbatch_text(recipe_with("slurm.nodes=4", "slurm.gpus_per_node=8"), tmp_path, REPORT))
    assert options["nodes"] == "1"
    assert "gpus-per-node" not in options


def test_a_container_is_sruns_and_brings_its_own_python(tmp_path: Path) -> None:
    image = "registry.example#hydra:1"
    text = sbatch_text(
        recipe_with("slurm.container_image=/images/hydra.sqsh", "slurm.container_mounts=/data:/data"),
        tmp_path,
        "pretrain",
    )
    command = text.partition("\nsrun ")[2].splitlines()[0]
    assert "--container-image=/images/hydra.sqsh --container-mounts=/data:/data python3 -u -m submitit" in command
    with pytest.raises(ValueError, match=r"slurm\.container_image"):
        recipe_with(f"slurm.container_image={image} x")


def test_values_never_become_shell(tmp_path: Path) -> None:
    for bad in ("a b", "a\nb", "$(id)", "`id`", "a'b"):
        with pytest.raises(ValueError, match=r"slurm\.partition"):
            recipe_with(f"slurm.partition={bad!r}")
    text = sbatch_text(recipe_with(), tmp_path / "it's $(id)", "pretrain")
    assert "$(id)" not in re.sub(r"'[^']*'", "", text.replace("'\"'\"'", ""))
