"""Accuracy under AutoAttack (Croce and Hein, ICML 2020), run by its authors' code: the standard version or parts of it.

A chunk is one call of the library, whose random numbers start from (seed, first image of the chunk), so that verdicts
equal those of a direct call. The library attacks only what its attacks so far have left, in fp32 and in eval mode.
Its warnings about a defence that it may not evaluate correctly are kept as columns flag_<what>.
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

EnsembleName = Literal["autoattack", "apgd", "square"]
ENSEMBLES: dict[EnsembleName, tuple[str, ...]] = {
    "autoattack": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "apgd": ("apgd-ce", "apgd-t"),
    "square": ("square",),
}
"""Attacks of the standard version, in its order: all; the two strongest; the one that sees no gradients."""
TITLES: dict[EnsembleName, str] = {
    "autoattack": "AutoAttack (standard)",
    "apgd": "APGD-CE and targeted APGD-DLR",
    "square": "Square attack",
}
TARGETS, ITERATIONS, QUERIES = 9, 100, 5000
"""The standard version's budgets; with fewer classes all others are targets."""

FLAGS = {
    "randomized defense": "randomised",
    "probability distribution": "probabilities",
    "dynamic defense": "dynamic",
    "zero gradient": "zero_gradient",
    "Square Attack has decreased": "square_stronger",
}
"""Words of the library's warnings -> what they are called here."""
OTHER = "other"

PREAMBLE = 6
"""How often the library asks for logits to check the network, before it counts what is right clean."""


class _Recorded(AutoAttack):
    """The library, and which class it saw whenever it asked for logits."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.seen: list[Tensor] = []
        super().__init__(*arguments, **options)

    def get_logits(self, x: Tensor) -> Tensor:
        logits = super().get_logits(x)
        self.seen.append(logits.max(dim=1)[1])
        return logits


class _Heard(logging.Handler):
    """Which of FLAGS the library raised."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.flags: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        flag = next((name for words, name in FLAGS.items() if words in said), OTHER)
        if flag not in self.flags:
            log.warning("AutoAttack: %s", said)
        self.flags.add(flag)


@contextmanager
def _alone(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Where the library may run: what it changes of this process is put back, and its numbers are fp32's."""
    tracing, trained = sys.gettrace(), [p for p in network.parameters() if p.requires_grad]
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        try:
            for parameter in trained:  # FAB goes backward through the whole network
                parameter.requires_grad_(False)
            for name in checks.funcs:  # counts gradients that a network takes of itself, over all networks so far
                checks.funcs[name] = 0
            if device.type == "cuda" and deterministic:
                # FAB sums along rows, in an order that is fixed but that PyTorch does not vouch for.
                warnings.filterwarnings("ignore", ".*deterministic", UserWarning)
                torch.use_deterministic_algorithms(True, warn_only=True)
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            if device.type == "cuda":
                torch.use_deterministic_algorithms(deterministic)
            for parameter in trained:
                parameter.requires_grad_(True)
            sys.settrace(tracing)


def _broken_by(attacks: tuple[str, ...], seen: list[Tensor], y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Which images each attack broke that those before it had left, and which are left: bool [n] each.

    `seen` are the classes that the library saw: of all images, then after each attack of those that were left to it.
    """
    left = seen[PREAMBLE] == y
    broken = {attack: torch.zeros_like(left) for attack in attacks}
    for attack, answers in zip(attacks, seen[PREAMBLE + 1 :], strict=False):  # it stops when nothing is left
        attacked = left.nonzero().squeeze(1)
        lost = attacked[answers != y[attacked]]
        broken[attack][lost] = True
        left[lost] = False
    return broken, left


@dataclass(frozen=True)
class Ensemble:
    """One or several attacks of AutoAttack's standard version: an image is robust if it is right under all of them."""

    name: EnsembleName
    threat_model: ThreatModel
    classes: int
    seed: int
    iterations: int = ITERATIONS
    queries: int = QUERIES

    @property
    def targets(self) -> int:
        return min(TARGETS, self.classes - 1)

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
        """What the library's generator starts from for the chunk `ids`; the same for every name."""
        return scope_key(self.seed, "autoattack", int(ids[0]))

    def library(self, network: nn.Module, device: torch.device, seed: int) -> _Recorded:
        """The library's own object, which is called once."""
        logging.getLogger("auto-attack").setLevel(logging.WARNING)  # it announces itself, at every chunk
        norm = "Linf" if self.threat_model.norm == "linf" else "L2"
        eps = float(self.threat_model.eps)
        library = _Recorded(network, norm=norm, eps=eps, seed=seed, device=device, version="standard")
        library.verbose = False
        library.attacks_to_run = list(ENSEMBLES[self.name])
        library.apgd.n_iter = library.apgd_targeted.n_iter = library.fab.n_iter = self.iterations
        library.apgd_targeted.n_target_classes = library.fab.n_target_classes = self.targets
        library.square.n_queries = self.queries
        return library

    def verdicts(self, network: nn.Module, x: Tensor, y: Tensor, ids: NDArray[np.int64]) -> dict[str, Tensor]:
        x = x.contiguous()  # the library takes views
        heard, logger = _Heard(), logging.Logger("auto-attack")
        logger.addHandler(heard)
        with _alone(network, x.device):
            with torch.no_grad():
                clean = ranked(network(x))
            top1, top5 = hits(clean, y)
            library = self.library(network, x.device, self.seed_of(ids))
            library.logger = library.apgd.logger = library.apgd_targeted.logger = logger
            _, answers = library.run_standard_evaluation(x, y, batch_size=len(x))
        broken, left = _broken_by(ENSEMBLES[self.name], library.seen, y)
        if not torch.equal(left, answers == y):
            raise RuntimeError("AutoAttack's answers are not those of its attacks; is this its version 0.2.0?")
        columns = {"clean_prediction": clean[:, 0], "clean_correct": top1, "clean_top5": top5}
        columns["robust_correct"] = left & top1
        columns |= {f"broken_{attack}": found for attack, found in broken.items()}
        for flag in (*FLAGS.values(), OTHER):
            columns[f"flag_{flag}"] = torch.full_like(top1, flag in heard.flags)
        return columns
