"""HYDRA's phases as one training loop: robust pretraining, score pruning, finetuning, evaluation.

This package knows nothing of SLURM or of the command line. Its public API is one function, `pipeline.load`:

    import pipeline

    network = pipeline.load("runs/first", keep_fraction=0.1)

which is `pipeline.evaluation.load.load_network`; it is imported on first access, since it needs torch.
"""

from __future__ import annotations

import os
import pwd
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.evaluation.load import load_network as load

__all__ = ["load"]


def _name_user() -> None:
    """Set USER and HOME where neither the environment nor passwd has them, as for `docker run --user` and OpenShift.

    torch, among others, asks for the user's name to name folders, and fails without one. Every process of ours comes
    by here before it imports such a library.
    """
    if os.environ.get("HOME") and any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        return  # what getpass.getuser asks first; a look into passwd may need a network
    uid = os.getuid()
    try:
        pwd.getpwuid(uid)
    except KeyError:
        os.environ["USER"] = os.environ.get("USER") or f"uid-{uid}"
        os.environ["HOME"] = os.environ.get("HOME") or "/"  # as docker does


_name_user()


def __getattr__(name: str) -> Any:
    if name == "load":
        from pipeline.evaluation.load import load_network

        return load_network
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
