"""The state that a stage changes from step to step, in parts that convert themselves to and from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor, nn

from pipeline.models.ema import Ema
from pipeline.models.pruning.harp import BudgetPenalty
from pipeline.models.pruning.mask_drift import MaskDrift
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import load_state, named_state
from pipeline.run.checkpoint import Snapshot
from pipeline.run.progress import Progress
from pipeline.training.dynamic_masks import DynamicMasks
from pipeline.training.engine import Engine


class Stateful(Protocol):
    """A part of a stage's state."""

    @property
    def prefix(self) -> str | tuple[str, ...]:
        """Prefix of the names of its tensors in a checkpoint, and of no other part's."""
        ...

    def state(self) -> dict[str, Tensor]:
        """CPU copies under their names in a checkpoint. Collective."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned, on any number of workers. Errors: ValueError if it does not fit."""
        ...


class Perturbations(Stateful, Protocol):
    """The perturbation of training images that an objective carries from step to step."""

    def of(self, micro_batch: int, ids: Tensor, keys: Tensor, step: int, /) -> Tensor:
        """That of this worker's micro-batch of this index in step `step`: [n, 3, s, s] float32.

        `ids` [n] and `keys` [n], both int64, are those of its images and of their noise. Values written in place
        persist. May be collective.
        """
        ...


Part = TypeVar("Part", bound=Stateful)


def restored(part: Part, snapshot: Snapshot | None) -> Part:
    """The part, with the state of the snapshot if there is one."""
    if snapshot is not None:
        tensors = {**snapshot.model, **snapshot.train_state}
        part.load({name: tensor for name, tensor in tensors.items() if name.startswith(part.prefix)})
    return part


class NetworkState:
    """The network in training, with its scores if it has any."""

    prefix = ("weight/", "score/", "rate/", "buffer/")

    def __init__(self, network: nn.Module, scores: Scores | None) -> None:
        self.network, self.scores = network, scores

    def state(self) -> dict[str, Tensor]:
        """The tensors of `named_state`."""
        tensors = named_state(self.network).items()
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Call it before an engine is built, which copies the weights. Masks are computed from the scores."""
        load_state(self.network, tensors, self.scores)


@dataclass(frozen=True)
class StageState:
    """The parts of one stage's state."""

    network: NetworkState
    engine: Engine
    ema: Ema | None = None
    """The moving average of the trained parameters, for phases that have one."""
    noise: Perturbations | None = None
    """For objectives that carry a perturbation from step to step, or remember it from epoch to epoch."""
    drift: MaskDrift | None = None
    """How far the masks have changed; on rank 0 of phases that train scores."""
    penalty: BudgetPenalty | None = None
    """For scores that are trained with HARP's allocation."""
    dynamic_masks: DynamicMasks | None = None
    """For stages whose masks change while weights train; their scores are the masks."""

    def snapshot(self, progress: Progress) -> Snapshot:
        """The contents of a checkpoint. Collective."""
        train_state: dict[str, Tensor] = {}
        others = (self.ema, self.noise, self.drift, self.penalty, self.dynamic_masks)
        parts: list[Stateful | None] = [self.engine, *others]
        for part in parts:
            if part is not None:
                train_state |= part.state()
        return Snapshot(self.network.state(), train_state, progress)
