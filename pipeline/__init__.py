"""HYDRA's phases as one training loop: robust pretraining, score pruning, finetuning, evaluation.

This package knows nothing of SLURM or of the command line. Its public API is one function, `pipeline.load`:

    import pipeline

    network = pipeline.load("runs/first", keep_fraction=0.1)

which is `pipeline.evaluation.load.load_network`; it is imported on first access, since it needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.evaluation.load import load_network as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from pipeline.evaluation.load import load_network

        return load_network
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
