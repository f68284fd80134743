"""The nodes of a SLURM job: how many workers they carry, and what is said of one that does not come.

No torch and no Ray: the node that submits and the tasks that watch need neither.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.recipe.schema import Recipe
from pipeline.recipe.sections import divisors
from pipeline.recipe.slurm import Slurm


def workers_for(recipe: Recipe, nodes: int) -> int:
    """The largest legal number of workers on so many nodes. Errors: ValueError if the nodes carry none."""
    carried = _carried(recipe, nodes)
    return max(count for count in divisors(recipe.batch.micro_batches_per_step) if count <= carried)


def unused_workers(recipe: Recipe, nodes: int) -> str | None:
    """What to say where the nodes carry more workers than the recipe's micro-batches can be dealt to."""
    carried, used = _carried(recipe, nodes), workers_for(recipe, nodes)
    if used == carried:
        return None
    micro_batches = recipe.batch.micro_batches_per_step
    legal = ", ".join(map(str, divisors(micro_batches)))
    return (
        f"{nodes} node{'s' * (nodes > 1)}: using {used} of {carried} workers; legal: {legal} "
        f"(they share the {micro_batches} micro-batches of a step)"
    )


def _carried(recipe: Recipe, nodes: int) -> int:
    assert recipe.slurm is not None
    return nodes * recipe.slurm.workers_of_a_node(recipe.workers.threads)


def look_at(hosts: Sequence[str], slurm: Slurm) -> str:
    """What to do about nodes that did not do their part."""
    exclude = ",".join([*([slurm.exclude] if slurm.exclude else []), *hosts])
    return f"look at {', '.join(hosts)}, or give the `run` command again with slurm.exclude={exclude}"
