"""How the methods of a run were tuned, and how many passes over the training images each took."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from pipeline.recipe.stages import DENSE
from pipeline.report.history import History, read_history, stage_cost
from pipeline.report.results import NetworkResult, RunResult
from pipeline.run.records import TrialResult


@dataclass(frozen=True)
class Passes:
    """Forward-backward passes over the training images, pretraining included."""

    network: float | None
    """Of the stages that the network came from; None for objectives that propagate bounds, or without metrics."""
    all_trials: float | None
    """With those of the trials that were not chosen."""


PassCounts = dict[tuple[str, Decimal], Passes]
"""(name of a finished network, keep_fraction) -> its passes."""


def count_passes(run: RunResult) -> PassCounts:
    """Passes of every finished network of a run. Errors: ValueError naming a damaged file."""
    histories = {history.stage.name: history for history in read_history(run)}
    return {
        (network.name, network.keep_fraction): Passes(
            _passes(_lineage(network, histories)), _passes(_all_stages(network, histories))
        )
        for network in run.networks
        if network.model_sha256 is not None
    }


def chosen_trial(network: NetworkResult) -> TrialResult | None:
    return next((trial for trial in network.tuned if trial.chosen), None)


def tuning_lines(runs: list[RunResult]) -> list[str]:
    """How each network of comparable runs was tuned, one line each; without tuning, one line for all."""
    recipe, passes = runs[0].recipe, count_passes(runs[0])
    if recipe.sparsity.tune is None:
        rates = [f"{name} lr {phase.lr:g}" for name, phase in recipe.phases if phase and name != "pretrain"]
        pruned = {name: each.network for (name, _), each in passes.items() if name != DENSE}
        counts = {name: _number(count) for name, count in pruned.items() if count is not None}
        text = f"{next(iter(counts.values()))} each" if len(set(counts.values())) == 1 else _listed(counts)
        text = f"; passes over the training images: {text}" if counts else ""
        return [f"not tuned: {', '.join(reversed(rates))}{text}"]
    lines = []
    for network in runs[0].networks:
        per_run = [run.find(network.name, network.keep_fraction) for run in runs]
        chosen = {
            run.recipe.seed: trial.rates
            for run, each in zip(runs, per_run, strict=True)
            if each is not None and (trial := chosen_trial(each)) is not None
        }
        if chosen:
            same = len(set(chosen.values())) == 1
            rates = next(iter(chosen.values())) if same else _listed({f"seed {seed}:": r for seed, r in chosen.items()})
            images, each = recipe.data.validation_images, passes[network.name, network.keep_fraction]
            trials = f"{len(recipe.sparsity.tune.trials)} trials"
            text = f"{network.label}: {trials}; {rates} chosen on {images:,} held-out images"
            if each.network is not None and each.all_trials is not None:
                text += f"; {_number(each.network)} passes, {_number(each.all_trials)} with all trials"
            lines.append(text)
    return lines


def tuning_columns(network: NetworkResult, passes: PassCounts) -> dict[str, float | None]:
    """For tables: number of trials, what was chosen, and passes."""
    trial, counts = chosen_trial(network), passes.get((network.name, network.keep_fraction), Passes(None, None))
    keys = ("finetune_lr", "prune_lr", "held_out_robust_accuracy")
    columns: dict[str, float | None] = {"trials": len(network.tuned) or None}
    columns |= {f"chosen_{key}": getattr(trial, key, None) for key in keys}
    return columns | {"passes": counts.network, "passes_with_all_trials": counts.all_trials}


def _lineage(network: NetworkResult, histories: dict[str, History]) -> list[History]:
    """The stages that a network came from."""
    trial, stages = chosen_trial(network), []
    name = trial.stage if trial else network.stage
    while name in histories:
        stages.append(histories[name])
        name = histories[name].stage.starts_from
    return stages


def _all_stages(network: NetworkResult, histories: dict[str, History]) -> list[History]:
    """The stages of all its trials, and those that they start from."""
    names, pending = set[str](), [network.stage]
    while pending:
        if (name := pending.pop()) in histories and name not in names:
            names.add(name)
            pending += histories[name].stage.sources
    return [histories[name] for name in names if not histories[name].stage.trials]


def _passes(histories: list[History]) -> float | None:
    counts = [stage_cost(history).pass_epochs for history in histories]
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


def _number(passes: float | None) -> str:
    return f"{passes:,.1f}".removesuffix(".0")


def _listed(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
