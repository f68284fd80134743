"""The size of the images that a finished network takes."""

from __future__ import annotations

from pipeline.evaluation.load import LoadedNetwork
from pipeline.run.provenance import load_run_recipe


def image_size_of(network: LoadedNetwork) -> int:
    """Pixels. Errors: ValueError if neither its file nor its run says."""
    size = network.metadata.get("image_size") or (network.run and load_run_recipe(network.run).data.image_size)
    if not size:
        raise ValueError(f"{network.file} does not say the size of its images; give the run that it is from")
    return size
