"""`doctor`'s checks, with one thing broken at a time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from launch.doctor import files, gpu_step, gpus, machine, node_job, services, software
from launch.doctor.outcome import Outcome, Subject
from launch.ray_cluster import trial
from launch.slurm import submit
from pipeline.distributed import Group
from pipeline.run.tracking import wandb_mirror
from tests.support.commands import ROOT
from tests.support.small_recipe import small_recipe
from tests.support.wandb_server import wandb_server

MACHINE = Subject()


def no_progress(done: int, total: int) -> None:
    """For checks that report none."""


def subject_of(folder: Path, **sections: object) -> Subject:
    return Subject(small_recipe(folder, **sections).model_dump(mode="json"))


def assert_says(outcome: Outcome, status: str, *parts: str) -> None:
    line = outcome.line("check")
    assert outcome.status == status, line
    assert "\n" not in line
    assert [part for part in parts if part not in line] == [], line


# --- machine ----------------------------------------------------------------------------------------------------------


def test_shared_memory_of_dockers_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB, of which all are free."""
    status = SimpleNamespace(f_bavail=16384, f_blocks=16384, f_frsize=4096)
    monkeypatch.setattr(machine.os, "statvfs", lambda path: status)
    outcome = machine.check_shared_memory(MACHINE, no_progress)
    assert_says(outcome, "fail", "/dev/shm has 67.1 MB of 67.1 MB free", "need 268.4 MB", "--shm-size 8g")


def test_no_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
    assert_says(machine.check_shared_memory(MACHINE, no_progress), "fail", "No such file", "mount a tmpfs")


@pytest.mark.parametrize(("mode", "status"), [("eager", "warn"), ("compiled", "fail")])
def test_a_temporary_folder_in_which_nothing_can_be_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, status: str
) -> None:
    """A program without its x bit is refused as one on a noexec mount is (EACCES)."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(machine, "scratch_parent", lambda: tmp_path)
    subject = subject_of(tmp_path, engine={"mode": mode})
    assert_says(machine.check_temporary_folder(subject, no_progress), "pass", str(tmp_path), "executable")
    monkeypatch.setattr(Path, "chmod", lambda path, mode: None)
    assert_says(machine.check_temporary_folder(subject, no_progress), status, "noexec", "torch.compile", "TMPDIR")
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_folder_that_is_missing_or_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda folder: 5_000_000)
    monkeypatch.setattr(machine, "scratch_parent", lambda: tmp_path)
    outcome = machine.check_temporary_folder(MACHINE, no_progress)
    assert_says(outcome, "fail", "5.0 MB free of 1.0 GB", "TMPDIR")
    monkeypatch.setattr(machine, "scratch_parent", lambda: tmp_path / "none")
    assert_says(machine.check_temporary_folder(MACHINE, no_progress), "fail", "none cannot be used: No such file")


@pytest.mark.parametrize(
    ("limits", "parts"),
    [
        ("(256, 256)", ["fail  open files: at most 256", "Ray needs 4096", "limits.conf"]),
        ("(256, 5000)", ["warn  open files: 256 may be", "ulimit -n 5000 before the command"]),
        ("(5000, 5000)", ["pass  open files: 5000 may be"]),
    ],
)
def test_a_low_limit_of_open_files(limits: str, parts: list[str]) -> None:
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, {limits})\n"
        "from launch.doctor import machine, outcome\n"
        "print(machine.check_open_files(outcome.Subject(), print).line('open files'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert [part for part in parts if part not in done.stdout] == [], done.stdout


# --- software ---------------------------------------------------------------------------------------------------------


def test_versions_of_this_environment() -> None:
    assert_says(software.check_versions(MACHINE, no_progress), "pass", "packages are those pinned")


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the code needs exactly, one that the tests did not run with, one that is missing."""
    versions = {"numpy": "99.0", "torch": "2.11.0+cu128"}
    real = metadata.version
    monkeypatch.setattr(software.metadata, "version", lambda name: versions.get(name) or real(name))
    outcome = software.check_versions(MACHINE, no_progress)
    pin = software.read_pins(ROOT / "requirements.txt")["numpy"]
    assert_says(outcome, "warn", f"numpy 99.0, pinned {pin}", "make setup")
    assert "torch" not in outcome.text, "a build of the pinned version for another CUDA"
    versions["ray"] = "2.0.0"
    needed = next(one for one in software.metadata.requires("hydra-pipeline") or [] if one.startswith("ray"))
    assert_says(software.check_versions(MACHINE, no_progress), "fail", f"ray 2.0.0, needed {needed.split(']')[1]}")

    def version(name: str) -> str:
        if name == "ffcv":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(software.metadata, "version", version)
    assert_says(software.check_versions(MACHINE, no_progress), "fail", "ffcv is missing", "make setup")


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ffcv_writes_and_decodes_an_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(files, "scratch_parent", lambda: tmp_path)
    assert_says(files.check_ffcv(MACHINE, no_progress), "pass", "decoded as a worker does")
    assert list(tmp_path.iterdir()) == []

    shape = (3, files.SIDE, files.SIDE)
    assert_says(files.compare_image(np.full(shape, 40, np.uint8)), "fail", "differs by 160 of 255", "make setup")


def test_damaged_data_is_found_by_the_node_that_reads_it(fashion_data: Path, tmp_path: Path) -> None:
    for name in ("train.beton", "test.beton"):
        for path in (name, f"{name}.manifest.json"):
            shutil.copy(fashion_data / path, tmp_path / path)
    subject, calls = subject_of(tmp_path), []
    assert_says(files.check_data(subject, lambda *call: calls.append(call)), "pass", "train.beton and ", "every byte")
    done, total = zip(*calls, strict=True)
    assert done == tuple(range(1, total[0] + 1))
    file = tmp_path / "test.beton"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    assert_says(files.check_data(subject, no_progress), "fail", f"{file} is damaged: its 1. part", "data verify")
    others = Subject(subject.values, reads_files=False)
    assert_says(files.check_data(others, no_progress), "pass", "another node reads the images")
    file.unlink()
    with pytest.raises(ValueError, match=r"data\.test_file = .* does not exist"):
        files.check_data(others, no_progress)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"no archive")
    assert_says(files.check_network(subject_of(tmp_path), no_progress), "pass", "small_cnn, ", " weights")
    subject = subject_of(tmp_path, model={"weights": str(tmp_path / "weights.pt")})
    with pytest.raises(ValueError, match=r"weights\.pt"):
        files.check_network(subject, no_progress)


def test_too_little_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "free_bytes", lambda folder: 1_000_000)
    assert_says(files.check_disk(MACHINE, no_progress), "fail", "1.0 MB free, about 1.0 GB are needed", "make room")
    assert_says(files.check_disk(subject_of(tmp_path), no_progress), "fail", "1.0 MB free, about ", "make room")
    monkeypatch.setattr(files, "free_bytes", lambda folder: 10**12)
    assert_says(files.check_disk(subject_of(tmp_path), no_progress), "pass", "1.0 TB free of about ")
    assert list(tmp_path.iterdir()) == []


# --- GPUs -------------------------------------------------------------------------------------------------------------


def test_a_step_is_repeatable_and_the_check_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where the same code runs in bf16."""
    group = Group(0, 1, torch.device("cpu"))
    gpu_step.check_step(group)
    steps = iter([[torch.zeros(2)], [torch.ones(2)]])
    monkeypatch.setattr(gpu_step, "take_step", lambda group: next(steps))
    with pytest.raises(RuntimeError, match="not deterministic"):
        gpu_step.check_step(group)
    monkeypatch.setattr(gpu_step, "take_step", lambda group: [torch.tensor([float("inf")])])
    with pytest.raises(RuntimeError, match="not finite"):
        gpu_step.check_step(group)


@pytest.mark.slow
def test_two_processes_take_a_step_together() -> None:
    assert gpus.step_on_all("cpu", 2) == []


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(gpus, "gpu_models", lambda: [])
    assert_says(gpus.check_gpus(MACHINE, no_progress), "warn", "there is none", "nvidia-smi lists none")
    wanted = subject_of(tmp_path, workers={"device": "cuda"})
    assert_says(gpus.check_gpus(wanted, no_progress), "fail", "workers.device = cuda, and there is none")
    monkeypatch.setattr(gpus, "gpu_models", lambda: ["NVIDIA A100, driver 470.1"])
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("the driver is too\nold")))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    outcome = gpus.check_gpus(MACHINE, no_progress)
    assert_says(outcome, "fail", "the driver has 1 (NVIDIA A100, driver 470.1)", "uses none: the driver is too old")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert_says(gpus.check_gpus(MACHINE, no_progress), "fail", "CUDA_VISIBLE_DEVICES hides them")


# --- services ---------------------------------------------------------------------------------------------------------


def program(path: Path, lines: str) -> None:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("echo noise >&2; echo 'error: Ray did not start (no memory)' >&2; exit 1", "Ray did not start (no memory)"),
        ("exit 69", "its driver ended with 69"),
        ("sleep 300", "it did not start, run a task and stop in 1 s"),
    ],
)
def test_ray_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: str, reason: str) -> None:
    program(tmp_path / "python", lines)
    scratch: list[Path] = []
    monkeypatch.setattr(trial, "python_for_ray", lambda folder: scratch.append(folder) or str(tmp_path / "python"))
    monkeypatch.setattr(services, "RAY_S", 1.0 if "sleep" in lines else 100.0)
    assert_says(services.check_ray(MACHINE, no_progress), "fail", reason, "fix: what the lines about memory")
    assert not scratch[0].exists()


def test_wandb_offline_is_said(no_wandb_account: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    off = subject_of(tmp_path)  # tracking.wandb = disabled
    assert_says(services.check_wandb(off, no_progress), "pass", "disabled, by tracking.wandb")
    assert_says(services.check_wandb(MACHINE, no_progress), "warn", "no key is here", "wandb login")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert_says(services.check_wandb(MACHINE, no_progress), "pass", "offline, by choice (WANDB_MODE")
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(ValueError, match="WANDB_MODE = sometimes"):
        services.check_wandb(MACHINE, no_progress)


def test_wandbs_server(no_wandb_account: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert_says(services.check_wandb(MACHINE, no_progress), "pass", f"online: {server.url} accepts the key")
    monkeypatch.setattr(wandb_mirror, "INIT_SECONDS", 1.0)
    assert_says(services.check_wandb(MACHINE, no_progress), "fail", "cannot be reached", "WANDB_MODE=offline")


def test_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / "bin"
    place.mkdir()
    (place / "sleep").symlink_to(shutil.which("sleep") or "/bin/sleep")
    monkeypatch.setenv("PATH", str(place))
    wanted = Subject(on_slurm=True)
    outcome = services.check_slurm(wanted, no_progress)
    assert_says(outcome, "fail", "sinfo was not found", "a login node")
    assert_says(services.check_slurm(MACHINE, no_progress), "pass", "not asked for (sinfo was not found")
    program(place / "sinfo", "echo 'slurm_load_partitions: Unable to contact controller' >&2; exit 1")
    assert_says(services.check_slurm(wanted, no_progress), "fail", "Unable to contact controller")
    program(place / "sinfo", "echo 'low up 3'; echo 'low up 1'; echo 'high down 4'")
    assert_says(services.check_slurm(wanted, no_progress), "pass", "low (4 nodes), high (0 nodes)")
    for partition, status in {"low": "pass", "high": "has no node that is up", "gpu": "does not exist"}.items():
        subject = subject_of(tmp_path, slurm={"partition": partition})
        outcome = services.check_slurm(subject, no_progress)
        assert_says(outcome, "pass" if status == "pass" else "fail", "" if status == "pass" else status)
    monkeypatch.setattr(submit, "CLIENT_S", 1)
    program(place / "sinfo", "exec sleep 100")
    assert_says(services.check_slurm(wanted, no_progress), "fail", "did not answer in 1 s")


# --- nodes ------------------------------------------------------------------------------------------------------------


def test_a_folder_that_nodes_do_not_see(tmp_path: Path) -> None:
    hosts = ["n1", "n2"]
    outcome = node_job.check_shared_folder(tmp_path / "none", "abc", hosts, 0)
    assert_says(outcome, "fail", "none is not seen here", "that all nodes mount at the same path")
    (tmp_path / "token").write_text("of another folder")
    assert_says(node_job.check_shared_folder(tmp_path, "abc", hosts, 0), "fail", "is another folder here")
    (tmp_path / "token").write_text("abc")
    (tmp_path / "node-0.jsonl").write_text("")
    assert_says(node_job.check_shared_folder(tmp_path, "abc", hosts, 0), "fail", "nothing of n2 is seen here")
    (tmp_path / "node-1.jsonl").write_text("")
    assert_says(node_job.check_shared_folder(tmp_path, "abc", hosts, 0), "pass", "what 2 nodes write there is seen")


@pytest.mark.parametrize("known", [True, False], ids=["one node wrote", "no node wrote"])
def test_nodes_of_which_nothing_arrives_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: bool) -> None:
    if known:
        rows = ['{"host": "n1", "hosts": ["n1", "n2"]}', '{"line": "pass  x: y", "status": "pass"}', '{"done": true}']
        (tmp_path / "node-0.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "7_1_log.err").write_text("first\nNo module named launch\n")
    monkeypatch.setattr(node_job, "ask_squeue", lambda jobs: ({"7": ("FAILED", "NonZeroExitCode")}, ""))
    monkeypatch.setattr(node_job, "UNKNOWN_S", -1.0)
    answers = {"squeue": "n[1-2]\n", "scontrol": "n1\nn2\n"}
    monkeypatch.setattr(node_job, "run_client", lambda *command: answers[command[0]])
    lines: list[str] = []
    states: list[str] = []
    assert not node_job._gather(tmp_path, "7", lambda host, line: lines.append(f"{host} {line}"), states.append)
    assert states == ["job 7: FAILED (NonZeroExitCode)"]
    assert len(lines) == 2
    assert lines[0].startswith("n1 pass  x: y" if known else "n1 fail  shared folder: nothing of this node arrived in")
    assert lines[1].startswith("n2 fail  shared folder: nothing of this node arrived in")
    assert "its log ends with: No module named launch" in lines[1]
