"""An exported file as a torch module that can be attacked: its own answers, its twin's gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.deployment.onnx_file import INPUT, OUTPUT, session_of
from pipeline.deployment.twin import Twin

TINY = torch.finfo(torch.float32).tiny


class _AnswersOf(torch.autograd.Function):
    """The file's logits, exactly, in place of the twin's, whose gradient they get."""

    @staticmethod
    def forward(ctx: Any, twin_logits: Tensor, file_logits: Tensor) -> Tensor:
        return file_logits.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class AttackedFile(nn.Module):
    """Images [n, 3, height, width] float32 in [0, 1] -> the file's logits, by ONNX Runtime on the CPU.

    The file is asked at every step of an attack, so an attack succeeds if and only if the file is wrong, and the
    gradient is that of its straight-through twin (BPDA: Athalye et al., ICML 2018). Errors: those of `Twin`.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        super().__init__()
        self.twin = Twin(path)
        self._session = session_of(path, threads)

    def answers(self, images: Tensor) -> Tensor:
        """The file's logits, without a gradient."""
        (logits,) = self._session.run([OUTPUT], {INPUT: images.detach().cpu().contiguous().numpy()})
        return torch.from_numpy(np.asarray(logits)).to(images.device)

    def forward(self, images: Tensor) -> Tensor:
        answers = self.answers(images)
        if not (torch.is_grad_enabled() and images.requires_grad):
            return answers
        return _AnswersOf.apply(self.twin(images), answers)

    def twin_gap(self, images: Tensor) -> Tensor:
        """[n]: how far the twin's logits are from the file's, as a share of the file's largest |logit|."""
        with torch.no_grad():
            answers = self.answers(images)
            difference = (self.twin(images) - answers).abs().amax(dim=1)
        return difference / answers.abs().amax(dim=1).clamp_min(TINY)


class ScaledLogits(nn.Module):
    """A network whose logits have standard deviation 1, whatever their scale: cross-entropy does not saturate on them.

    The class is unchanged. The scale is a constant for the gradient: a network that has learned to grow its logits
    hides no direction by it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return scaled(self.network(images))


def scaled(logits: Tensor) -> Tensor:
    """Logits [..., classes] divided by their standard deviation over the classes."""
    return logits / logits.detach().std(dim=-1, keepdim=True).clamp_min(TINY)
