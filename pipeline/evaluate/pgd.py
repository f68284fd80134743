"""Exact clean and PGD accuracy: one verdict per image, whatever the number of workers.

Images go through in fixed chunks of file order, dealt to the workers there are; noise is keyed by sample id. An image
counts as robust if it is right clean and under every restart (worst case per image, Madry et al. 2018 sec. 5.2). fp32
throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from pipeline.attacks import ball_of, crafting, pgd
from pipeline.data.loader import Batch, Loader
from pipeline.evaluate.statistics import wilson_interval
from pipeline.group import Group
from pipeline.keys import sample_keys
from pipeline.recipe_sections import Evaluation, ThreatModel
from pipeline.stopping import StopRequested

Verdicts = dict[str, NDArray[Any]]
Crops = Callable[[NDArray[np.int64]], NDArray[np.int32]]


@dataclass(frozen=True)
class Attack:
    """PGD as it is evaluated."""

    threat_model: ThreatModel | None
    steps: int
    step_size: float
    restarts: int
    seed: int

    @staticmethod
    def of(threat_model: ThreatModel | None, evaluation: Evaluation, seed: int) -> Attack:
        return Attack(threat_model, evaluation.steps, float(evaluation.step_size), evaluation.restarts, seed)


def _ranked(logits: torch.Tensor) -> torch.Tensor:
    """Classes by falling logit, int64 [n, classes]. Ties go by class order, so a constant network is not right."""
    return torch.sort(logits, dim=1, descending=True, stable=True).indices


def _hits(ranked: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(top-1 correct, top-5 correct), bool [n]."""
    hits = ranked[:, :5] == labels[:, None]
    return hits[:, 0], hits.any(dim=1)


def _judge(network: nn.Module, batch: Batch, attack: Attack, device: torch.device) -> Verdicts:
    images = batch.images.to(device).float().div(255.0)
    labels = batch.labels.to(device)
    with torch.no_grad():
        clean = _ranked(network(images))
    clean_top1, clean_top5 = _hits(clean, labels)
    robust_top1, robust_top5 = clean_top1.clone(), clean_top5.clone()
    if attack.threat_model is not None:
        ball = ball_of(attack.threat_model)
        for restart in range(attack.restarts):
            noise = sample_keys(batch.ids.numpy(), attack.seed, "evaluate", restart)
            keys = torch.from_numpy(noise.view(np.int64)).to(device)
            adversarial = pgd(
                network,
                images,
                lambda logits: F.cross_entropy(logits, labels, reduction="none"),
                ball=ball,
                steps=attack.steps,
                step_size=attack.step_size,
                start=ball.random_start(images, keys),
            )
            with torch.no_grad():
                top1, top5 = _hits(_ranked(network(adversarial)), labels)
            robust_top1 &= top1
            robust_top5 &= top5
    return {
        "sample_id": batch.ids.numpy(),
        "label": batch.labels.numpy(),
        "clean_prediction": clean[:, 0].cpu().numpy(),
        "clean_correct": clean_top1.cpu().numpy(),
        "clean_top5": clean_top5.cpu().numpy(),
        "robust_correct": robust_top1.cpu().numpy(),
        "robust_top5": robust_top5.cpu().numpy(),
    }


def _going_on(done: int, total: int) -> bool:
    return False


def evaluate(
    network: nn.Module,
    loader: Loader,
    ids: NDArray[np.int64],
    crops: Crops,
    attack: Attack,
    chunk: int,
    group: Group,
    on_chunk: Callable[[int, int], bool] = _going_on,
) -> Verdicts:
    """Verdicts for the samples `ids`, sorted by id, on every rank.

    Chunks are cut in the order of `ids`; `on_chunk(done, total)` reports this rank's and says whether to stop,
    which raises StopRequested on every rank. The network is put in eval mode
    and restored; its parameters are not touched. Collective.
    """
    chunks = [ids[start : start + chunk] for start in range(0, len(ids), chunk)]
    mine = chunks[group.rank :: group.world]

    def plan() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32]]]:
        for part in mine:
            yield part, crops(part)

    parts: list[Verdicts] = []
    with crafting(network):
        for batch in loader.batches(plan()):
            parts.append(_judge(network, batch, attack, group.device))
            if on_chunk(len(parts), len(mine)):
                break
    answers = group.gather((parts, len(parts) < len(mine)))
    if any(stopped for _, stopped in answers):
        raise StopRequested("asked to stop amid an evaluation, which starts again on resume")
    gathered = [part for rank_parts, _ in answers for part in rank_parts]
    if not gathered:
        raise ValueError("there is no image to evaluate")
    joined = {name: np.concatenate([part[name] for part in gathered]) for name in gathered[0]}
    order = np.argsort(joined["sample_id"], kind="stable")
    verdicts = {name: column[order] for name, column in joined.items()}
    if not np.array_equal(verdicts["sample_id"], np.sort(ids)):
        raise RuntimeError("evaluation did not judge every image exactly once")
    return verdicts


def summarise(verdicts: Verdicts) -> dict[str, Any]:
    """Exact counts and 95 % Wilson intervals for result files."""
    total = len(verdicts["sample_id"])
    summary: dict[str, Any] = {"images": total}
    for column in ("clean_correct", "clean_top5", "robust_correct", "robust_top5"):
        name = column.removesuffix("_correct")
        correct = int(verdicts[column].sum())
        low, high = wilson_interval(correct, total)
        summary[f"{name}_correct"] = correct
        summary[f"{name}_accuracy"] = {"value": correct / total, "low": low, "high": high}
    return summary
