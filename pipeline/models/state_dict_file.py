"""The state dict in a file of weights: safetensors, or a file of torch.save, read such that no code in it runs."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline.models.export import METADATA_KEY
from pipeline.models.torch_file import RefusedFile, check_tensor, check_torch_file

CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "module")
"""Keys under which training programs store the state dict; the last one is DeepSpeed's."""
DEEPEST = 4
"""State dicts lie below at most so many of these keys."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Name -> tensor on the CPU; of a network exported by this project, its normalisation too.

    Errors: ValueError naming the file, and the tensor if it is one that must not be copied.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        check_torch_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except RefusedFile:
        raise
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged archive or pickle may raise anything
        if isinstance(error, pickle.UnpicklingError) and (match := re.search(r"GLOBAL (\S+)", str(error))):
            raise ValueError(
                f"{path} was not read: it refers to {match[1]}, and loading anything but tensors could run code. If "
                "you trust the file, load it elsewhere and save its state dict alone, preferably as .safetensors"
            ) from None
        # torch's message recommends loading without weights_only, so it is not shown.
        raise ValueError(
            f"{path} is damaged or not a weights file ({type(error).__name__}); download it again"
        ) from None
    return _state_dict_of(path, content)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as stream:
            metadata = json.loads((stream.metadata() or {}).get(METADATA_KEY, "{}"))
        # Networks exported by this project store their normalisation in the metadata.
        normalisation = {f"metadata.{key}": torch.tensor(metadata[key]) for key in ("mean", "std") if key in metadata}
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:  # a RecursionError is a RuntimeError
        raise ValueError(f"{path} is damaged or not safetensors: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    return tensors | normalisation


def _state_dict_of(path: Path, content: Any, containers: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The state dict in `content`, which lies in the file under `containers`."""
    if len(containers) > DEEPEST:
        raise ValueError(f"{path} holds no state dict under {' / '.join(containers)}: is it a mapping within itself?")
    if isinstance(content, Mapping):
        if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
            for name, tensor in content.items():
                check_tensor(path, name, tensor)
            return dict(content)
        for container in CONTAINERS:
            if isinstance(content.get(container), Mapping):
                return _state_dict_of(path, content[container], (*containers, container))
        content_kind = f"a mapping with the keys {sorted(str(key) for key in content)}"
    else:
        content_kind = type(content).__name__
    raise ValueError(
        f"{path} holds {content_kind}; expected a state dict, alone or under one of {', '.join(CONTAINERS)}"
    )
