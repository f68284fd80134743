"""Loads an exported network of a run as a plain module, for attacks, evaluations and third-party code.

    import pipeline

    network = pipeline.load("runs/demo", keep_fraction=0.01)

Imports none of the training dependencies (Ray, DeepSpeed, FFCV, wandb).
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path

from torch import nn

from pipeline.models.export import load_model
from pipeline.recipe.fields import canonical_decimal
from pipeline.recipe.stages import NETWORK_OF_PHASE, Stage, stages_of
from pipeline.run.files import sha256_of
from pipeline.run.layout import RunFolder, StageFolder
from pipeline.run.provenance import load_run_recipe
from pipeline.run.records import StageResult

DENSE = Decimal(1)
"""The keep_fraction of the network before pruning."""


def load_network(
    run: str | Path,
    keep_fraction: float | str | Decimal | None = None,
    *,
    method: str | None = None,
    stage: str | None = None,
) -> nn.Module:
    """The network of a finished stage, on the CPU and in eval mode.

    Maps images [n, 3, height, width], float32 in [0, 1] and of size data.image_size, to logits [n, num_classes]:
    normalisation is built in, and pruned connections are zeros in place.

    `run` is a run's folder, or one model.safetensors, which takes no further arguments. In a run, `keep_fraction` is
    one of the recipe's, or 1 for the dense network; it may be omitted if the other arguments leave only one. `method`
    (hydra, magnitude, random, snip; default hydra) and `stage`, the last part of the stage's name, select among the
    networks of one keep_fraction: HYDRA's is finetune, if the recipe has that phase, else prune.

    Errors: ValueError for a missing, unfinished or damaged run, network or file; the message lists what is available.
    """
    path = Path(run)
    if path.suffix == ".safetensors":
        arguments = {"keep_fraction": keep_fraction, "method": method, "stage": stage}
        if extra := [key for key, value in arguments.items() if value is not None]:
            raise ValueError(f"{path} is one network; omit {extra[0]}, or give the run's folder")
        return load_model(path).eval()
    if not RunFolder(path).recipe.is_file():
        raise ValueError(f"{path} is not a run (it has no recipe.yaml); give its folder, such as runs/demo, or a file")
    selected_stage = _select_stage(path, stages_of(load_run_recipe(path)), keep_fraction, method, stage)
    folder = path / selected_stage.name
    if not StageFolder(folder).result.is_file():
        raise ValueError(f"{folder} is not finished; python -m launch resume {path}")
    network = load_model(StageFolder(folder).network)
    if sha256_of(StageFolder(folder).network) != StageResult.read(StageFolder(folder).result).model_sha256:
        raise ValueError(
            f"{folder / 'model.safetensors'} is not the network that the stage exported (its sha256 differs from "
            "result.json); restore that file, or load this one by its path"
        )
    return network.eval()


def _select_stage(
    run: Path, stages: list[Stage], keep_fraction: float | str | Decimal | None, method: str | None, phase: str | None
) -> Stage:
    if keep_fraction is not None:
        stages = _filter_stages(str(run), "keep_fraction", _canonical(keep_fraction), stages, _keep_fraction)
    if method is not None:
        stages = _filter_stages(str(run), "method", method.lower(), stages, _method)
    if phase is not None:
        stages = _filter_stages(str(run), "stage", phase, stages, lambda s: s.phase)
    if len(keeps := _distinct_names(stages, _keep_fraction)) > 1:
        raise ValueError(f"{run} has several networks; give keep_fraction, one of {', '.join(keeps)} (1 is dense)")
    return next((s for s in reversed(stages) if _method(s) == "hydra"), stages[-1])


def _filter_stages(run: str, key: str, value: str, stages: list[Stage], name: Callable[[Stage], str]) -> list[Stage]:
    """The stages whose `name` is `value`."""
    matches = [stage for stage in stages if name(stage) == value]
    if not matches:
        keeps = _distinct_names(stages, _keep_fraction)
        where = f" at keep_fraction {keeps[0]}" if len(keeps) == 1 else ""
        raise ValueError(f"{run} has no {key} {value}{where}; there is {', '.join(_distinct_names(stages, name))}")
    return matches


def _distinct_names(stages: list[Stage], name: Callable[[Stage], str]) -> list[str]:
    return list(dict.fromkeys(map(name, stages)))


def _keep_fraction(stage: Stage) -> str:
    return canonical_decimal(DENSE if stage.keep_fraction is None else stage.keep_fraction)


def _method(stage: Stage) -> str:
    return NETWORK_OF_PHASE[stage.phase].lower()


def _canonical(keep_fraction: float | str | Decimal) -> str:
    """Spelling of the recipe: 0.10 and 1e-1 are both 0.1."""
    try:
        return canonical_decimal(Decimal(str(keep_fraction)))
    except InvalidOperation:
        return str(keep_fraction)
