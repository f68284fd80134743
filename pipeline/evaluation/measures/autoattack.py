"""Accuracy under AutoAttack (Croce and Hein, ICML 2020), by its authors' code: the standard version or parts of it.

A chunk is one call of the library, seeded by (seed, first image of the chunk), so verdicts equal those of a direct
call. Each attack runs only on the images that the attacks before it leave robust, in fp32 and eval mode. The library's
warnings about defences that it may evaluate incorrectly become columns flag_<name>.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pyautoattack import AutoAttack, checks
from torch import Tensor, nn

from pipeline.evaluation.measures.base import hits, ranked
from pipeline.recipe.objective import ThreatModel
from pipeline.rng import scope_key

log = logging.getLogger(__name__)

EnsembleName = Literal["autoattack", "apgd", "apgd-ce", "square"]
ENSEMBLES: dict[EnsembleName, tuple[str, ...]] = {
    "autoattack": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "apgd": ("apgd-ce", "apgd-t"),
    "apgd-ce": ("apgd-ce",),
    "square": ("square",),
}
"""Attacks in the standard version's order: all; the two strongest; one of them; the gradient-free one."""
TITLES: dict[EnsembleName, str] = {
    "autoattack": "AutoAttack (standard)",
    "apgd": "APGD-CE and targeted APGD-DLR",
    "apgd-ce": "APGD-CE",
    "square": "Square attack",
}
TARGETS, ITERATIONS, QUERIES = 9, 100, 5000
"""Budgets of the standard version; with fewer classes, every wrong class is a target."""

FLAGS = {
    "randomized defense": "randomised",
    "probability distribution": "probabilities",
    "dynamic defense": "dynamic",
    "zero gradient": "zero_gradient",
    "Square Attack has decreased": "square_stronger",
}
"""Text in the library's warning -> name of the flag."""
OTHER = "other"

PREAMBLE = 6
"""Forward passes of the library's own checks before its clean evaluation."""


class _RecordingAutoAttack(AutoAttack):
    """The library, recording the predicted classes of every `get_logits` call."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.predictions: list[Tensor] = []
        super().__init__(*arguments, **options)

    def get_logits(self, x: Tensor) -> Tensor:
        logits = super().get_logits(x)
        self.predictions.append(logits.max(dim=1)[1])
        return logits


class _FlagHandler(logging.Handler):
    """Collects the FLAGS that the library raises."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.flags: dict[str, str] = {}
        """Flag -> the first message that raises it."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        flag = next((name for words, name in FLAGS.items() if words in message), OTHER)
        self.flags.setdefault(flag, message)


@contextmanager
def _isolated(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Run the library in fp32 and restore the process state that it changes."""
    tracing, trainable = sys.gettrace(), [p for p in network.parameters() if p.requires_grad]
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        try:
            for parameter in trainable:  # FAB's backward pass covers the whole network
                parameter.requires_grad_(False)
            for name in checks.funcs:  # a global count of gradients that networks take of themselves
                checks.funcs[name] = 0
            if device.type == "cuda" and deterministic:
                # FAB uses an op that PyTorch lists as nondeterministic, although its order of summation is fixed here.
                warnings.filterwarnings("ignore", ".*deterministic", UserWarning)
                torch.use_deterministic_algorithms(True, warn_only=True)
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            if device.type == "cuda":
                torch.use_deterministic_algorithms(deterministic)
            for parameter in trainable:
                parameter.requires_grad_(True)
            sys.settrace(tracing)


def _broken_by(attacks: tuple[str, ...], predictions: list[Tensor], y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Images that each attack breaks first, and the images that are left robust: bool [n] each.

    `predictions` are the classes of the library's calls: of all images, then of the images that each attack runs on.
    """
    left = predictions[PREAMBLE] == y
    broken = {attack: torch.zeros_like(left) for attack in attacks}
    for attack, answers in zip(
        attacks, predictions[PREAMBLE + 1 :], strict=False
    ):  # the library stops once no image is left
        attacked = left.nonzero().squeeze(1)
        lost = attacked[answers != y[attacked]]
        broken[attack][lost] = True
        left[lost] = False
    return broken, left


@dataclass(frozen=True)
class Ensemble:
    """Attacks of AutoAttack's standard version: an image is robust if it is classified correctly under all of them."""

    name: EnsembleName
    threat_model: ThreatModel
    classes: int
    seed: int
    iterations: int = ITERATIONS
    queries: int = QUERIES
    most_targets: int = TARGETS

    @property
    def targets(self) -> int:
        return min(self.most_targets, self.classes - 1)

    @property
    def settings(self) -> dict[str, Any]:
        attacks = ENSEMBLES[self.name]
        budgets: dict[str, Any] = {"iterations": self.iterations, "targets": self.targets}
        queries = {"queries": self.queries}
        return {
            "norm": self.threat_model.norm,
            "eps": str(self.threat_model.eps),
            "attacks": list(attacks),
            **(budgets if "apgd-t" in attacks else {}),
            **(queries if "square" in attacks else {}),
        }

    @property
    def title(self) -> str:
        return f"{TITLES[self.name]}, {self.threat_model.norm} eps {self.threat_model.eps}"

    def seed_of(self, ids: NDArray[np.int64]) -> int:
        """Seed of the library for the chunk `ids`, the same for every ensemble."""
        return scope_key(self.seed, "autoattack", int(ids[0]))

    def library(self, network: nn.Module, device: torch.device, seed: int) -> _RecordingAutoAttack:
        """The library's attack object for one chunk."""
        logging.getLogger("auto-attack").setLevel(logging.WARNING)  # it logs its settings for every chunk
        norm = "Linf" if self.threat_model.norm == "linf" else "L2"
        eps = float(self.threat_model.eps)
        library = _RecordingAutoAttack(network, norm=norm, eps=eps, seed=seed, device=device, version="standard")
        library.verbose = False
        library.attacks_to_run = list(ENSEMBLES[self.name])
        library.apgd.n_iter = library.apgd_targeted.n_iter = library.fab.n_iter = self.iterations
        library.apgd_targeted.n_target_classes = library.fab.n_target_classes = self.targets
        library.square.n_queries = self.queries
        return library

    def examples(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> Tensor:
        """Images x with each of those that an attack breaks replaced by its adversarial example."""
        with _isolated(network, x.device):
            return self._attack(network, x.contiguous(), y, ids)[1]

    def _attack(
        self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]
    ) -> tuple[_RecordingAutoAttack, Tensor, Tensor, dict[str, str]]:
        """The library after its attacks, the images that it returns, the network's answers to them, flags raised."""
        handler, logger = _FlagHandler(), logging.Logger("auto-attack")
        logger.addHandler(handler)
        library = self.library(network, x.device, self.seed_of(ids))
        library.logger = library.apgd.logger = library.apgd_targeted.logger = logger
        examples, answers = library.run_standard_evaluation(x, y, batch_size=len(x))
        return library, examples, answers, handler.flags

    def verdicts(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        x = x.contiguous()  # the library takes views
        with _isolated(network, x.device):
            with torch.no_grad():
                clean = ranked(network(x))
            top1, top5 = hits(clean, y)
            library, _, answers, flags = self._attack(network, x, y, ids)
        for message in flags.values():
            log.warning("AutoAttack: %s", message)
        broken, left = _broken_by(ENSEMBLES[self.name], library.predictions, y)
        if not torch.equal(left, answers == y):
            raise RuntimeError("AutoAttack's verdicts differ from those of its attacks; install pyautoattack 0.2.0")
        columns = {"clean_prediction": clean[:, 0], "clean_correct": top1, "clean_top5": top5}
        columns["robust_correct"] = left & top1
        columns |= {f"broken_{attack}": images for attack, images in broken.items()}
        for flag in (*FLAGS.values(), OTHER):
            columns[f"flag_{flag}"] = torch.full_like(top1, flag in flags)
        return columns
