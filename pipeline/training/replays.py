"""What free adversarial training asks of the loop: batches that come several times, and noise that is state.

The noise belongs to places in the step, not to images: place p of global micro-batch n has the noise that the last
step left there, whatever image that was for. A checkpoint holds it for all micro-batches of a step in their order, so
that any legal number of workers goes on with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor

from pipeline.data.loading.loader import Batch
from pipeline.distributed import Group
from pipeline.recipe.schema import Recipe

NOISE = "noise/perturbation"


def replayed(micro_batches: Iterator[Batch], per_step: int, times: int, start: int) -> Iterator[Batch]:
    """Micro-batches of the steps from `start` on, when each run of `per_step` of them makes `times` steps in a row.

    `micro_batches` begin with those of batch start // times. Each is taken once, when it is first needed, and kept
    until its batch's last step; as the loader's batches own their memory, nothing overwrites them meanwhile.
    """
    left = times - start % times
    for first in micro_batches:
        kept = [first]
        yield first
        for batch in islice(micro_batches, per_step - 1):
            kept.append(batch)
            yield batch
        for _ in range(left - 1):
            yield from kept
        left = times


def start_noise(recipe: Recipe, group: Group) -> Tensor:
    """No perturbation yet, for this rank's micro-batches of a step: zeros [local, micro_batch, 3, s, s] float32."""
    batch, size = recipe.batch, recipe.data.image_size
    local = batch.micro_batches_per_step // group.world
    return torch.zeros(local, batch.micro_batch, 3, size, size, device=group.device)


def carried_noise(noise: Tensor, group: Group) -> dict[str, Tensor]:
    """All ranks' noise as a checkpoint holds it: CPU copies, global micro-batches in order. Collective.

    One micro-batch of each rank at a time, as on a device the whole may have no room.
    """
    rows = [group.gather_rows(one[None]).to("cpu", copy=True) for one in noise]
    return {NOISE: torch.stack(rows, dim=1).flatten(0, 1)}


def own_noise(carried: Mapping[str, Tensor], group: Group) -> Tensor:
    """This rank's part of what `carried_noise` returned, on any number of workers that divides the micro-batches."""
    whole = carried[NOISE]
    local = len(whole) // group.world
    return whole[group.rank * local : (group.rank + 1) * local].to(group.device, copy=True)
