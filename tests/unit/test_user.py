"""A user id without an entry in passwd, as `docker run --user` and OpenShift give."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
START = """
import pwd
def no_entry(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = no_entry
import pipeline
"""
ASK = """
import getpass, os
from pathlib import Path
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
import torch._dynamo.config
import pipeline.evaluation.load
print(getpass.getuser(), Path.home(), os.path.basename(default_cache_dir()))
"""


@pytest.mark.parametrize(
    ("environment", "answer"),
    [
        ({}, [f"uid-{os.getuid()}", "/", f"torchinductor_uid-{os.getuid()}"]),
        ({"HOME": "/data"}, [f"uid-{os.getuid()}", "/data", f"torchinductor_uid-{os.getuid()}"]),
        ({"HOME": "/data", "LOGNAME": "ann"}, ["ann", "/data", "torchinductor_ann"]),
    ],
)
def test_a_user_without_a_name_has_one_for_the_libraries(environment: dict[str, str], answer: list[str]) -> None:
    others = {name: value for name, value in os.environ.items() if name not in (*NAMES, "HOME")}
    done = subprocess.run(
        [sys.executable, "-c", START + ASK], env=others | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == answer


def test_a_user_with_an_entry_keeps_the_environment() -> None:
    code = "import os; before = dict(os.environ); import pipeline; print(before == dict(os.environ))"
    others = {name: value for name, value in os.environ.items() if name not in (*NAMES, "HOME")}
    done = subprocess.run([sys.executable, "-c", code], env=others, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
