"""The device that is chosen, why no GPU is, and the settings for bitwise reproducibility, without a GPU."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import distributed
from pipeline.distributed import pick_device, unusable_gpus
from tests.support.commands import ROOT

OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver\nand more"
)
NAME_OF_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture
def unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, whose driver is too old for torch."""

    def init() -> None:
        raise RuntimeError(OLD_DRIVER)

    for gpu in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / gpu).mkdir()
    monkeypatch.setattr(distributed, "DRIVER_GPUS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("unseen")
def test_why_torch_sees_no_gpu_is_said(caplog: pytest.LogCaptureFixture) -> None:
    words = r"none of the 2 GPUs .* driver on your system is too old .*built for CUDA 13.0; see 'GPUs' in docs/guide.md"
    with caplog.at_level(logging.WARNING):
        assert pick_device("auto") == torch.device("cpu")
    assert "workers.device = auto: using the CPU, as torch sees none of the 2 GPUs" in caplog.text
    assert "and more" not in caplog.text
    with pytest.raises(ValueError, match=f"workers.device = cuda: torch sees {words}"):
        pick_device("cuda")


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_were_hidden_are_not_missed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hidden: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert pick_device("auto") == torch.device("cpu")
    assert unusable_gpus() is None
    assert not caplog.records


def test_a_machine_without_gpus_has_none_to_explain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "DRIVER_GPUS", tmp_path / "none")
    assert unusable_gpus() is None


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 0), False),
        ((7, 5), True),
        ((8, 6), True),
        ((8, 9), True),
        ((9, 0), True),
        ((11, 0), False),
        ((13, 0), True),
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
) -> None:
    """Code runs on GPUs of its major version that are no older; compute_ is compiled for newer ones, too."""
    built_for = ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_100", "sm_120", "compute_120"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in {
        "is_available": True,
        "current_device": 1,
        "get_device_capability": capability,
        "get_arch_list": built_for,
        "get_device_name": "Tesla",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    if runs:
        assert pick_device("auto") == torch.device("cuda", 1)
        return
    with pytest.raises(ValueError, match=rf"no code for Tesla \(sm_{capability[0]}{capability[1]}\), only for sm_75, "):
        pick_device("auto")


def test_deterministic_products_have_the_workspace_that_torch_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reads it in C, and raises at the first product of matrices on a GPU if it is another one."""
    monkeypatch.delenv(NAME_OF_CUBLAS, raising=False)
    code = f"""
import ctypes, os
from pipeline.distributed import make_deterministic
make_deterministic(1)
getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
print(getenv(b"{NAME_OF_CUBLAS}").decode())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() in (":4096:8", ":16:8")


def test_no_other_code_turns_deterministic_algorithms_on() -> None:
    """So that whatever does has the workspace too: commands, workers, benches and the processes of tests."""
    calls = {
        str(path.relative_to(ROOT))
        for folder in ("pipeline", "launch", "tests/bench", "tests/support")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "use_deterministic_algorithms"
    }
    # AutoAttack's measure relaxes them to warnings, where they are on, and puts them back.
    assert calls == {"pipeline/distributed.py", "pipeline/evaluation/measures/autoattack.py"}
