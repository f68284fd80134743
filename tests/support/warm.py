"""What the workers of tests find imported and compiled: `processes` forks them from a process that has done it once.

Of a worker's start, some nine seconds of a processor, nearly all is imports and numba's compilation of the decoder.
"""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa

os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported; nothing here may touch a GPU before it forks

import pipeline.training.stage  # noqa: F401
from pipeline.data.loading.decoder import compiled_decoder

compiled_decoder()
pa.array(np.zeros(1))  # imports pandas where it is installed
