"""Models the time of a recipe's step on more workers: `python -m tests.bench.scaling RECIPE --images-per-s R`.

A step on n workers takes the slowest worker's compute time plus its communication time; no overlap is assumed:

    compute(n)  micro-batches per worker x images x (1 + attack passes x ATTACK_PASS) / R
    send(n)     gradients, by a ring all-reduce: 2 (n - 1)/n x their bytes / bandwidth, and 2 (n - 1) latencies
                ZeRO's weights, all-gathered:      (n - 1)/n x their bytes / bandwidth, and (n - 1) latencies
                BatchNorm's statistics of every micro-batch, all-gathered: those of the other workers

The bytes are counted on the network; `tests/distributed/test_collectives.py` checks how often they are sent. R and the
network's speed are inputs, on which the results depend.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.models import build_network
from pipeline.recipe.file import load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.report.history import passes_per_step

ATTACK_PASS = 2 / 3
"""An attack's pass has no gradients of weights: two of a training pass's three matrix products per layer."""
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Sent:
    """Bytes that one step sends."""

    gradients: int
    """bf16 for the weights of convolutions and linear layers under bf16, fp32 for the rest."""
    weights: int
    """fp32; none at ZeRO 0."""
    statistics: int
    """Of one micro-batch, fp32."""

    @staticmethod
    def of(recipe: Recipe) -> Sent:
        with torch.device("meta"):
            network = build_network(recipe.model, recipe.seed)
        half = recipe.engine.precision == "bf16"
        layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        in_half = sum(p.numel() for layer in layers for p in layer.parameters(recurse=False)) if half else 0
        every = sum(p.numel() for p in network.parameters())
        channels = sum(m.num_features for m in network.modules() if isinstance(m, _BatchNorm))
        return Sent(2 * in_half + 4 * (every - in_half), 4 * every if recipe.engine.zero_stage else 0, 8 * channels)


@dataclass(frozen=True)
class Machine:
    """The hardware's speed."""

    images_per_s: float
    """Forward and backward passes of one GPU, with the recipe's network, image size and micro-batch."""
    bandwidth: float
    """Bytes per second that each GPU sends and receives over the slowest link while all others do too."""
    latency: float
    """Seconds until a message's first byte arrives."""


def compute_s(recipe: Recipe, workers: int, machine: Machine) -> float:
    """Compute time of one step, in seconds. Errors: ValueError unless the workers divide the step's micro-batches."""
    batch, passes = recipe.batch, passes_per_step(recipe.objective)
    if batch.micro_batches_per_step % workers:
        raise ValueError(f"{workers} workers do not divide {batch.micro_batches_per_step} micro-batches")
    if passes is None:
        raise ValueError(f"objective.name={recipe.objective.name} propagates bounds; the model counts passes")
    each = batch.batch_per_step // workers
    return each * (1 + (passes - 1) * ATTACK_PASS) / machine.images_per_s


def send_s(recipe: Recipe, sent: Sent, workers: int, machine: Machine) -> float:
    """Communication time of one step, in seconds."""
    others = (workers - 1) / workers
    gathered = recipe.batch.micro_batches_per_step * sent.statistics
    volume = others * (2 * sent.gradients + sent.weights + gathered)
    return volume / machine.bandwidth + 4 * (workers - 1) * machine.latency


def table(recipe: Recipe, machine: Machine, nodes: Sequence[int]) -> str:
    """Markdown table with a line per number of nodes, and the reason where a number is not possible."""
    sent, most = Sent.of(recipe), recipe.batch.micro_batches_per_step
    mebi = 2**20
    lines = [
        f"{recipe.name}: {most} micro-batches of {recipe.batch.micro_batch} a step; gradients "
        f"{sent.gradients / mebi:.0f} MiB, weights {sent.weights / mebi:.0f} MiB, statistics "
        f"{most * sent.statistics / mebi:.1f} MiB",
        "",
        "| nodes | GPUs | compute, ms | sending, ms | images/s | of the ideal |",
        "|---|---|---|---|---|---|",
    ]
    for count in nodes:
        workers = count * GPUS_PER_NODE
        if most % workers:
            lines.append(
                f"| {count} | {workers} | not possible: at most {most} workers, or a smaller micro-batch | | | |"
            )
            continue
        compute, sending = compute_s(recipe, workers, machine), send_s(recipe, sent, workers, machine)
        rate = recipe.batch.batch_per_step / (compute + sending)
        lines.append(
            f"| {count} | {workers} | {1e3 * compute:.1f} | {1e3 * sending:.1f} | {rate:,.0f} "
            f"| {100 * compute / (compute + sending):.0f} % |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="such as batch.micro_batch=8")
    parser.add_argument("--images-per-s", type=float, required=True, help="R: forward and backward passes of one GPU")
    parser.add_argument(
        "--gigabytes-per-s", type=float, default=25.0, help="per GPU, between nodes (default: %(default)s)"
    )
    parser.add_argument("--latency-us", type=float, default=5.0, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    machine = Machine(options.images_per_s, 1e9 * options.gigabytes_per_s, 1e-6 * options.latency_us)
    print(table(load_recipe(options.recipe, options.overrides), machine, (1, 2, 4, 8, 16, 32, 64)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
