"""The slurm section: units, ranges, refused values, and the number of workers of an allocation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from launch.run_folder import write_run_folder
from launch.slurm.nodes import workers_for
from launch.slurm.sbatch import section_of
from launch.slurm.submit import stages_by_job, submit_run
from pipeline.recipe.file import dump_recipe, load_recipe
from pipeline.recipe.slurm import Slurm
from tests.support.small_recipe import small_recipe

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "recipes" / "fashion_mnist.yaml"


@pytest.mark.parametrize(
    ("value", "minutes"),
    [(90, 90), ("90", 90), ("1:30:00", 90), ("0:00:30", 1), ("1-12:00", 2160), ("2-00:00:01", 2881)],
)
def test_times_are_minutes(value: Any, minutes: int) -> None:
    assert Slurm(time=value, signal_s=10).time == minutes


def test_a_time_in_yaml_needs_no_quotes(tmp_path: Path) -> None:
    """YAML 1.1 would read 12:00:00 as the number 43,200."""
    profile = tmp_path / "cluster.yaml"
    profile.write_text("time: 12:00:00\n")
    for recipe in (load_recipe(DEMO, [], profile), load_recipe(DEMO, ["slurm.time=12:00:00"])):
        assert recipe.slurm is not None
        assert recipe.slurm.time == 720


@pytest.mark.parametrize("value", ["1:30", "soon", "-5", "1-2", "", 0])
def test_other_times_are_refused(value: Any) -> None:
    with pytest.raises(ValidationError, match="time"):
        Slurm(time=value, signal_s=10)


@pytest.mark.parametrize(("value", "nodes"), [(2, (2, 2)), ("2", (2, 2)), ("1-4", (1, 4)), ([1, 4], (1, 4))])
def test_nodes_are_a_number_or_a_range(value: Any, nodes: tuple[int, int]) -> None:
    assert Slurm(nodes=value).nodes == nodes


@pytest.mark.parametrize("value", ["4-1", 0, "0-2", "many", "1-", [1, 2, 3]])
def test_other_nodes_are_refused(value: Any) -> None:
    with pytest.raises(ValidationError, match="nodes"):
        Slurm(nodes=value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gres": "gpu:8", "gpus_per_node": 8}, "both ask for GPUs"),
        ({"gres": "gpu:8"}, "needs workers_per_node"),
        ({"time": 1, "signal_s": 60}, "must be less than the time limit"),
        ({"options": {"output": "x"}}, "options.output = 'x': .* leave it out"),
        ({"options": {"ntasks-per-node": "2"}}, "options.ntasks-per-node = '2': .* leave it out"),
        ({"options": {"requeue": "no"}}, "options.requeue = 'no': .* leave it out"),
        ({"options": {"nodes": "3"}}, r"options.nodes = '3': .* use slurm\.nodes=3"),
        ({"options": {"mail-user": "a"}}, r"options.mail-user = 'a': .* use slurm\.mail_user=a"),
        ({"options": {"Bad Name": "x"}}, "options.Bad Name = 'x': write the long name"),
        ({"options": {"reservation\n": "x"}}, r"options.reservation\n = 'x': write the long name"),
        ({"options": {"reservation": "x\n"}}, r"options\.reservation"),
        ({"options": {"reservation": "x\n#SBATCH --wrap=id"}}, r"options\.reservation"),
        ({"account": "a\n"}, "account"),
        ({"partition": "a b"}, "partition"),
        ({"account": "a\nb"}, "account"),
    ],
)
def test_impossible_sections_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Slurm(**values)


def test_a_job_may_start_in_another_folder() -> None:
    assert Slurm(options={"chdir": "/scratch"}).options == {"chdir": "/scratch"}


def test_the_recipe_overrides_the_profile_and_the_command_line_both(tmp_path: Path) -> None:
    profile = tmp_path / "cluster.yaml"
    profile.write_text("partition: gpu\naccount: us\nmem: 10G\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(DEMO.read_text() + "slurm: {account: them, mem: 20G}\n")
    slurm = load_recipe(recipe, ["slurm.mem=30G"], profile).slurm
    assert slurm is not None
    assert (slurm.partition, slurm.account, slurm.mem) == ("gpu", "them", "30G")
    profile.write_text("- gpu\n")
    with pytest.raises(ValueError, match="a cluster profile is a mapping of slurm keys, got list"):
        load_recipe(recipe, [], profile)
    profile.write_text("partition: gpu\n")
    recipe.write_text(DEMO.read_text() + "slurm: [3]\n")
    with pytest.raises(ValueError, match=r"recipe.yaml: slurm = \[3\]: expected keys and values"):
        load_recipe(recipe, [], profile)


def test_what_is_dumped_is_read_back(tmp_path: Path) -> None:
    recipe = load_recipe(DEMO, ["slurm.nodes=1-4", "slurm.time=12:00:00", "slurm.setup=['module load cuda']"])
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


@given(nodes=st.integers(1, 20), per_node=st.integers(1, 16), micro_batches=st.integers(1, 64))
def test_the_largest_legal_number_of_workers_is_used(nodes: int, per_node: int, micro_batches: int) -> None:
    values = [f"slurm.workers_per_node={per_node}", "workers.count=1", "batch.micro_batch=4"]
    recipe = load_recipe(DEMO, [*values, f"batch.batch_per_step={4 * micro_batches}"])
    workers = workers_for(recipe, nodes)
    legal = [count for count in range(1, micro_batches + 1) if micro_batches % count == 0 and count <= nodes * per_node]
    assert workers == legal[-1]


def test_workers_of_a_node_follow_gpus_then_cpus() -> None:
    assert Slurm(gpus_per_node=8, cpus_per_task=64).workers_of_a_node(4) == 8
    assert Slurm(cpus_per_task=9).workers_of_a_node(4) == 2
    assert Slurm(workers_per_node=3, gpus_per_node=8).workers_of_a_node(1) == 3
    with pytest.raises(ValueError, match=r"slurm\.cpus_per_task 1 is less than the workers\.threads 4"):
        Slurm().workers_of_a_node(4)


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        (
            {"gpus_per_node": 8},
            r"slurm.cpus_per_task 1: a node's 8 workers, .* share cores; set slurm.cpus_per_task=16",
        ),
        ({"gres": "gpu:a100:4", "workers_per_node": 4, "cpus_per_task": 7}, r"slurm.cpus_per_task=8 or more"),
        ({"cpus_per_task": 8}, r"workers.device cuda: the job asks for no GPU, .* add slurm.gpus_per_node=N"),
        ({"cpus_per_task": 8, "gres": "disk:1"}, r"the job asks for no GPU"),
    ],
)
def test_jobs_whose_workers_would_wait_or_share_cores_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm: dict[str, Any], message: str
) -> None:
    recipe = small_recipe(tmp_path, slurm=slurm, workers={"device": "cuda", "threads": 2})
    with pytest.raises(ValueError, match=message):
        section_of(recipe)
    folder = tmp_path / "run"
    write_run_folder(folder, recipe, {})
    with pytest.raises(ValueError, match=message):
        submit_run(folder)
    assert not (folder / "jobs").exists()


def test_jobs_with_a_core_per_thread_are_not() -> None:
    Slurm(gpus_per_node=8, cpus_per_task=16).check_room("cuda", 2)
    Slurm(gres="gpu:8", workers_per_node=8, cpus_per_task=8).check_room("auto", 1)
    Slurm(workers_per_node=4).check_room("auto", 1)  # without GPUs, it is the user's own number


def test_jobs_hold_every_stage_once_and_baselines_have_their_own() -> None:
    recipe = load_recipe(DEMO, ["sparsity.baselines=[magnitude, random, snip]"])
    jobs = {name: [stage.name for stage in stages] for name, stages in stages_by_job(recipe).items()}
    expected = {"pretrain": ["pretrain"]}
    for keep in ("keep-0.1", "keep-0.01"):
        expected[keep] = [f"{keep}/prune", f"{keep}/finetune"]
        expected |= {f"{keep}-{name}": [f"{keep}/{name}"] for name in ("magnitude", "random", "snip")}
    assert jobs == expected
