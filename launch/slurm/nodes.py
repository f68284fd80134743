"""The nodes of a SLURM job: how many workers they have room for, and advice about nodes that fail.

Imports neither torch nor Ray: login nodes and node tasks do not need them.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.recipe.fields import divisors
from pipeline.recipe.schema import Recipe
from pipeline.recipe.slurm import Slurm


def workers_for(recipe: Recipe, nodes: int) -> int:
    """The largest legal number of workers on this many nodes. Errors: ValueError if there is room for none."""
    return recipe.batch.largest_workers(_capacity(recipe, nodes))


def unused_workers(recipe: Recipe, nodes: int) -> str | None:
    """A note if the nodes have room for more workers than the recipe's micro-batches can be split among."""
    capacity, used = _capacity(recipe, nodes), workers_for(recipe, nodes)
    if used == capacity:
        return None
    micro_batches = recipe.batch.micro_batches_per_step
    legal = ", ".join(map(str, divisors(micro_batches)))
    return (
        f"{nodes} node{'s' * (nodes > 1)}: using {used} of {capacity} workers; legal: {legal} "
        f"(they share the {micro_batches} micro-batches of a step)"
    )


def _capacity(recipe: Recipe, nodes: int) -> int:
    assert recipe.slurm is not None
    return nodes * recipe.slurm.workers_of_a_node(recipe.workers.threads)


def node_advice(hosts: Sequence[str], slurm: Slurm) -> str:
    """What a user can do about nodes that did not start or stopped responding."""
    exclude = ",".join([*([slurm.exclude] if slurm.exclude else []), *hosts])
    return f"check {', '.join(hosts)}, or repeat the `run` command with slurm.exclude={exclude}"
