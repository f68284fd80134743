"""A network as a `torch.export` program (.pt2), which plain torch loads: torch.export.load(path).module()."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from pipeline.deployment.onnx_file import CHECKED, CannotExport, check_same, random_images
from pipeline.models import Network
from pipeline.run.files import replacing, settle_file


def write_program(network: Network, image_size: int, path: Path) -> None:
    """Write `network` (in eval mode, on the CPU) for any batch size; compared with the network before it replaces
    `path`. Errors: CannotExport."""
    example = random_images(2, image_size, seed=0)
    with replacing(path) as temporary:
        try:
            program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("n")},))
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:500]
            raise CannotExport(f"torch.export cannot express this network: {reason}") from None
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # names files of this machine
        with temporary.open("wb") as stream:
            torch.export.save(program, stream)
        images = random_images(CHECKED, image_size, seed=1)
        with torch.inference_mode(), temporary.open("rb") as stream, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # torch's own reading
            logits = torch.export.load(stream).module()(images).numpy()
        check_same(network, images, logits, "the torch.export program")
        settle_file(temporary)
