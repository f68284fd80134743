"""Every GPU of this machine takes one training step, in a process of its own, all of them together."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from launch.doctor.outcome import Outcome, ProgressCallback, Subject
from launch.ray_cluster.scratch import scratch_parent
from pipeline.run.provenance import gpu_models

STEP_S = 400.0
"""All GPUs together: CUDA's start, NCCL's, a step twice."""


def check_gpus(subject: Subject, progress: ProgressCallback) -> Outcome:
    """What torch sees against what the driver has; then a step on each."""
    import torch

    wanted = "auto" if subject.recipe is None else subject.recipe.workers.device
    if wanted == "cpu":
        return Outcome("pass", "not asked for: workers.device = cpu")
    models, count = gpu_models(), torch.cuda.device_count()
    if count == 0 and models:
        text = f"the driver has {len(models)} ({models[0]}), torch {torch.__version__} uses none: {_why_none()}"
        fix = "a driver that is new enough for this torch, or a torch for this driver; see docs/clusters.md"
        return Outcome("fail", text, fix)
    if count == 0:
        text = "there is none: workers run on the CPU"
        if wanted == "cuda":
            return Outcome("fail", f"workers.device = cuda, and {text}", "a machine with GPUs, or workers.device=auto")
        return Outcome("warn", text, "their driver, if this machine has some: nvidia-smi lists none")
    faults = step_on_all("cuda", count)
    if faults:
        return Outcome("fail", "; ".join(faults), "look at the cards (nvidia-smi); NCCL_DEBUG=INFO says more")
    return Outcome("pass", f"{count} took a step (NCCL, bf16, deterministic): {torch.cuda.get_device_name(0)}")


def _why_none() -> str:
    import torch

    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles"):
        return "CUDA_VISIBLE_DEVICES hides them"
    try:
        torch.cuda.init()
    except Exception as error:  # of CUDA and torch, of several types
        return " ".join(str(error).split())
    return "it does not say why"


def step_on_all(device: str, count: int) -> list[str]:
    """Why the step failed, per process; empty if all went well. `device`: cuda, or cpu in tests."""
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=scratch_parent()) as place:
        command = [sys.executable, "-m", "launch.doctor.gpu_step", device, str(count), f"{place}/store"]
        processes = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for rank in range(count)
        ]
        end, faults = time.monotonic() + STEP_S, []
        try:
            for rank, process in enumerate(processes):
                try:
                    _, errors = process.communicate(timeout=max(0.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    faults.append(f"{device} {rank} did not answer in {STEP_S:g} s")
                    continue
                if process.returncode:
                    lines = [line.strip() for line in errors.splitlines() if line.strip()]
                    faults.append(f"{device} {rank}: {lines[-1] if lines else f'ended with {process.returncode}'}")
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return faults
