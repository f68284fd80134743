"""Whether wandb is online: what a person has said by wandb's own means, in its environment or its settings files."""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pipeline.regular_file import read_regular

Mode = Literal["online", "offline", "disabled"]
MODES: dict[str, Mode] = {
    **{"online": "online", "run": "online", "shared": "online"},
    **{"offline": "offline", "dryrun": "offline", "disabled": "disabled"},
}
"""Spelling -> mode; `run` and `dryrun` are wandb's older ones."""
TRUE = ("1", "true", "yes", "on", "t", "y")


def asked_mode(environment: Mapping[str, str], folder: Path) -> Mode | None:
    """The mode that WANDB_DISABLED, WANDB_MODE or a settings file asks for, in this order; None if none of them does.

    `wandb offline` writes a settings file below `folder`, where it is called. Errors: ValueError for a mode that wandb
    does not have.
    """
    if environment.get("WANDB_DISABLED", "").strip().lower() in TRUE:
        return "disabled"
    if environment.get("WANDB_MODE"):
        return _mode("WANDB_MODE", environment["WANDB_MODE"])
    root = Path(environment.get("WANDB_DIR") or folder)
    config = Path(environment.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    for path in (root / "wandb" / "settings", root / ".wandb" / "settings", config / "settings"):
        if (mode := _setting(path)) is not None:
            return _mode(f"mode in {path}", mode)
    return None


def settle_mode(setting: str) -> None:
    """Pass on what is asked for here to the processes of a run, which have other working folders.

    `setting` is tracking.wandb. Errors: those of `asked_mode`.
    """
    if setting != "disabled" and (mode := asked_mode(os.environ, Path.cwd())) is not None:
        os.environ["WANDB_MODE"] = mode


def _mode(key: str, text: str) -> Mode:
    if (mode := MODES.get(text.strip().lower())) is None:
        raise ValueError(f"{key} = {text}: wandb's mode is one of {', '.join(MODES)}; set one of them, or unset it")
    return mode


def _setting(path: Path) -> str | None:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(read_regular(path).decode("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, configparser.Error) as error:
        raise ValueError(f"{path}, wandb's settings, cannot be read: {' '.join(str(error).split())}") from None
    return parser.get("default", "mode", fallback=None)
