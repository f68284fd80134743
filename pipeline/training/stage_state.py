"""What a stage changes from step to step, as parts that each know how a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor, nn

from pipeline.models.ema import Ema
from pipeline.models.pruning.mask_drift import MaskDrift
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import load_state, named_state
from pipeline.run.checkpoint import Snapshot
from pipeline.run.progress import Progress
from pipeline.training.batches import FreeNoise
from pipeline.training.engine import Engine


class Stateful(Protocol):
    """A part of a stage's state."""

    @property
    def prefix(self) -> str | tuple[str, ...]:
        """What the names of its tensors in a checkpoint begin with, and no other part's."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Owned CPU copies under their names in a checkpoint. Collective."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned, on any number of workers. Errors: ValueError if it does not fit."""
        ...


Part = TypeVar("Part", bound=Stateful)


def restored(part: Part, snapshot: Snapshot | None) -> Part:
    """The same part, as it was when the snapshot was taken, if there is one."""
    if snapshot is not None:
        tensors = {**snapshot.model, **snapshot.train_state}
        part.load({name: tensor for name, tensor in tensors.items() if name.startswith(part.prefix)})
    return part


class NetworkState:
    """The network in training, with its scores if it has some."""

    prefix = ("weight/", "score/", "rate/", "buffer/")

    def __init__(self, network: nn.Module, scores: Scores | None) -> None:
        self.network, self.scores = network, scores

    def state(self) -> dict[str, Tensor]:
        """Those of `named_state`."""
        tensors = named_state(self.network).items()
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Before an engine is built for the network, which copies it. Masks follow the scores."""
        load_state(self.network, tensors, self.scores)


@dataclass(frozen=True)
class StageState:
    """The parts of one stage's state."""

    network: NetworkState
    engine: Engine
    ema: Ema | None = None
    """The moving average of what trains, for phases that have one."""
    noise: FreeNoise | None = None
    """For objectives that carry a perturbation from step to step."""
    drift: MaskDrift | None = None
    """How far the masks have moved; on rank 0 of phases that train scores."""

    def snapshot(self, progress: Progress) -> Snapshot:
        """Everything that a checkpoint holds. Collective."""
        train_state: dict[str, Tensor] = {}
        parts: list[Stateful | None] = [self.engine, self.ema, self.noise, self.drift]
        for part in parts:
            if part is not None:
                train_state |= part.state()
        return Snapshot(self.network.state(), train_state, progress)
