"""Imports and loads what the tests' workers need; `processes` forks them from a process that has done so once.

Nearly all of a worker's start, about five seconds of CPU time, is imports and loading the compiled decoder.
"""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa

os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported; no GPU may be used before the fork

import pipeline.training.stage  # noqa: F401
from pipeline.data.loading.decoder import compiled_decoder

compiled_decoder()
pa.array(np.zeros(1))  # imports pandas where it is installed
