"""sbatch scripts for common shapes of clusters, checked with the test cluster's own sbatch where possible."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from launch import run_folder
from launch.slurm.control_files import ControlFiles
from launch.slurm.report_job import REPORT
from launch.slurm.sbatch import sbatch_parameters, sbatch_text
from launch.slurm.submit import submit_run
from pipeline.recipe.file import load_recipe
from pipeline.recipe.schema import Recipe
from tests.support.commands import launch, wait_until
from tests.support.slurm_cluster import SlurmCluster
from tests.support.small_recipe import small_recipe

DEMO = Path(__file__).parents[2] / "recipes" / "fashion_mnist.yaml"
COMMON = ["slurm.time=1:00:00", "slurm.cpus_per_task=2"]


def recipe_with(*overrides: str) -> Recipe:
    return load_recipe(DEMO, [*COMMON, *overrides])


def options_of(text: str) -> dict[str, str]:
    """--name -> value of the #SBATCH lines."""
    options = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE)
    assert len({name for name, _ in options}) == len(options), "an option is there twice"
    return dict(options)


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
    "impossible",
    [["slurm.gpus_per_node=99", "slurm.workers_per_node=1"], ["slurm.constraint=quantum"], ["slurm.partition=none"]],
)
def test_sbatch_can_refuse(slurm: SlurmCluster, tmp_path: Path, impossible: list[str]) -> None:
    """Otherwise the acceptance above would mean nothing."""
    file = tmp_path / "job.sh"
    file.write_text(sbatch_text(recipe_with(*impossible), tmp_path / "run", "pretrain"))
    done = subprocess.run(["sbatch", "--test-only", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0


def test_options_say_what_the_recipe_says(tmp_path: Path) -> None:
    text = sbatch_text(
        recipe_with("slurm.nodes=1-4", "slurm.gpus_per_node=8", "slurm.workers_per_node=2", "slurm.signal_s=90"),
        tmp_path,
        "pretrain",
    )
    options = options_of(text)
    assert options["nodes"] == "1-4"
    assert options["gpus-per-node"] == "8"
    assert options["time"] == "60"
    assert options["signal"] == "USR2@90"
    assert "requeue" in options
    assert "ntasks-per-node" not in options, "of a range of nodes, SLURM would give the fewest"
    assert "--ntasks-per-node=1 --cpus-per-task=2" in text.partition("\nsrun ")[2]


@pytest.mark.parametrize("keep_fractions", [[0.1], [0.5, 0.1, 0.05]])
def test_what_is_printed_is_what_is_submitted(
    slurm: SlurmCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keep_fractions: list[float],
) -> None:
    """One job after pretrain is a plain job, several are an array; runs/ may be elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    before = slurm.submit("--hold", "--output=/dev/null", "--wrap=true")
    section = {"nodes": "1-2", "account": "tests", "qos": "normal", "exclude": "n2", "parallel_jobs": 2}
    section |= {"setup": ["module load 'cuda 12'"], "options": {"nice": "100"}, "mem": "1G", "partition": "low"}
    recipe = small_recipe(tmp_path, sparsity={"keep_fractions": keep_fractions, "baselines": []}, slurm=section)
    run_folder.write_run_folder(Path("runs/mine"), recipe, {})
    arguments = ["--name", "mine", "--on", "slurm", "--after", before, "--dry-run"]
    printed = launch(tmp_path, "run", "runs/mine/recipe.yaml", *arguments).out
    jobs = submit_run(Path("runs/mine"), before)
    ids = {"JOB_OF_pretrain": jobs[0].id, "JOBS_OF_sparsities": ":".join(job.id for job in jobs[1:-1])}
    for placeholder, job_id in ids.items():
        printed = printed.replace(placeholder, job_id)
    files = [f"runs/mine/jobs/{number}_submission.sh" for number in dict.fromkeys(j.id.partition("_")[0] for j in jobs)]
    assert [text.strip() for text in printed.split("#!/bin/bash")[1:]] == [
        Path(file).read_text().removeprefix("#!/bin/bash").strip() for file in files
    ]
    assert slurm.client("squeue", "-h", "-j", jobs[0].id, "-o", "%a|%q|%P").strip() == "tests|normal|low"
    assert "ExcNodeList=n2\n" in slurm.client("scontrol", "show", "job", jobs[0].id)


def test_a_job_that_is_submitted_inside_an_allocation_starts(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun would refuse what that says of itself. Where a site sets SBATCH_EXPORT=NONE, a job has SLURM_EXPORT_ENV."""
    section = {"mem": "1G", "setup": ["export SLURM_EXPORT_ENV=NONE", "export OF_SETUP=1"]}
    folder = tmp_path / "runs" / "mine"
    run_folder.write_run_folder(folder, small_recipe(tmp_path, slurm=section), {})
    with monkeypatch.context() as allocation:
        for name, value in {"JOB_ID": "1", "MEM_PER_CPU": "100", "GPUS_PER_NODE": "1", "NTASKS_PER_NODE": "3"}.items():
            allocation.setenv(f"SLURM_{name}", value)
        job = submit_run(folder)[0].id
    started = ControlFiles.of(folder, job, "0").was_counted
    waiting = ("PENDING", "RUNNING")
    wait_until(lambda: started() or slurm.job_state(job) not in waiting, 60, "the start of the task")
    assert started(), "\n".join(path.read_text() for path in (folder / "jobs").glob(f"{job}_*log.*"))
    tasks = [process for process in slurm.processes() if "submitit.core._submit" in process.cmdline()]
    assert "1" in [process.environ().get("OF_SETUP") for process in tasks if process.name().startswith("python")]


def test_each_task_of_an_array_is_requeued_by_itself(slurm: SlurmCluster, tmp_path: Path) -> None:
    """The last has the array's own job id, and ends while another runs. An uncounted start is not requeued."""
    control = tmp_path / "control"
    control.mkdir()
    script = tmp_path / "job.sh"
    teardown = "\n".join(sbatch_parameters(recipe_with(), tmp_path, "sparsities", None)["teardown"])
    script.write_text(
        f"""#!/bin/bash
restart=${{SLURM_RESTART_COUNT:-0}}
start={control}/$SLURM_JOB_ID-$restart
mkdir "$start"
echo "$SLURM_ARRAY_TASK_ID $restart" >> {tmp_path}/starts
[ "$SLURM_ARRAY_TASK_ID" = 0 ] || touch "$start/counted"
[ "$SLURM_ARRAY_TASK_ID" != 2 ] || echo $SLURM_JOB_ID > {tmp_path}/last
if [ "$SLURM_ARRAY_TASK_ID$restart" = 10 ]; then
  for _ in $(seq 300); do grep -q "2 1" {tmp_path}/starts && break; sleep 0.1; done
fi
test "$restart" != 0
{teardown}
"""
    )
    array = slurm.submit("--array=0-2", "--requeue", "--output=/dev/null", str(script))
    for task, state in enumerate(("FAILED", "COMPLETED", "COMPLETED")):
        slurm.wait_for_state(f"{array}_{task}", state)
    assert sorted((tmp_path / "starts").read_text().splitlines()) == ["0 0", "1 0", "1 1", "2 0", "2 1"]
    assert (tmp_path / "last").read_text().strip() == array


def test_the_report_needs_one_node_and_no_gpu(tmp_path: Path) -> None:
    options = options_of(sbatch_text(recipe_with("slurm.nodes=4", "slurm.gpus_per_node=2"), tmp_path, REPORT))
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
    assert "--container-image=/images/hydra.sqsh --container-mounts=/data:/data sh -c" in command
    assert " python3 -u -m submitit" in command
    text = sbatch_text(recipe_with(f"slurm.container_image={image}"), tmp_path, "pretrain")
    assert f"'--container-image={image}' sh -c" in text.partition("\nsrun ")[2].splitlines()[0]
    for bad in (f"{image} x", "#hydra"):
        with pytest.raises(ValueError, match=r"slurm\.container_image"):
            recipe_with(f"slurm.container_image='{bad}'")


def test_values_never_become_shell(tmp_path: Path) -> None:
    for bad in ("a b", "a\nb", "$(id)", "`id`", "a'b"):
        with pytest.raises(ValueError, match=r"slurm\.partition"):
            recipe_with(f"slurm.partition={bad!r}")
    text = sbatch_text(recipe_with(), tmp_path / "it's $(id)", "pretrain")
    assert "$(id)" not in re.sub(r"'[^']*'", "", text.replace("'\"'\"'", ""))
