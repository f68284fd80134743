"""A finished network of a run as a plain module, for attacks, evaluations and programs of others.

    import pipeline

    network = pipeline.load("runs/demo", keep_fraction=0.01)

Nothing of training is imported for it: neither Ray nor DeepSpeed, FFCV or wandb.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path

from torch import nn

from pipeline.models.export import load_model
from pipeline.recipe.fields import canonical_decimal
from pipeline.recipe.file import load_recipe
from pipeline.recipe.stages import NETWORK_OF_PHASE, Stage, stages_of
from pipeline.run.files import read_json, sha256_of
from pipeline.run.layout import RunFolder, StageFolder

DENSE = Decimal(1)
"""The keep_fraction of the network before pruning."""


def load_network(
    run: str | Path,
    keep_fraction: float | str | Decimal | None = None,
    *,
    method: str | None = None,
    stage: str | None = None,
) -> nn.Module:
    """A network of a finished stage, on the CPU and in eval mode.

    It takes images float32 [n, 3, height, width] in [0, 1], as large as data.image_size says, and gives logits
    [n, num_classes]: normalisation is inside, and pruned connections are zeros in place.

    `run` is a run's folder, or one model.safetensors, which needs nothing further. In a run, `keep_fraction` is one of
    the recipe's, or 1 for the dense network; it may be left out where the rest leaves one only. Several networks of one
    keep_fraction are told apart by `method` (hydra, magnitude, random, snip; hydra unless said otherwise) and by
    `stage`, the last part of the stage's name: HYDRA's is finetune, if the recipe has one, or prune.

    Errors: ValueError for a run, a network or a file that is not there, unfinished or damaged; what there is instead is
    named.
    """
    path = Path(run)
    if path.suffix == ".safetensors":
        given = {"keep_fraction": keep_fraction, "method": method, "stage": stage}
        if odd := [key for key, value in given.items() if value is not None]:
            raise ValueError(f"{path} is one network; leave {odd[0]} out, or give the run's folder")
        return load_model(path).eval()
    if not RunFolder(path).recipe.is_file():
        raise ValueError(f"{path} is not a run (it has no recipe.yaml); give its folder, such as runs/demo, or a file")
    chosen = _chosen(path, stages_of(load_recipe(RunFolder(path).recipe)), keep_fraction, method, stage)
    folder = path / chosen.name
    if not StageFolder(folder).result.is_file():
        raise ValueError(f"{folder} is not finished; python -m launch resume {path}")
    network = load_model(StageFolder(folder).network)
    if sha256_of(StageFolder(folder).network) != read_json(StageFolder(folder).result).get("model_sha256"):
        raise ValueError(
            f"{folder / 'model.safetensors'} is not the network that the stage ended with (its sha256 is not the one "
            "in result.json); bring that file back, or load this one by its own name"
        )
    return network.eval()


def _chosen(
    run: Path, stages: list[Stage], keep_fraction: float | str | Decimal | None, method: str | None, phase: str | None
) -> Stage:
    """The one stage that is meant."""
    if keep_fraction is not None:
        stages = _narrowed(str(run), "keep_fraction", _spelled(keep_fraction), stages, _keep_fraction)
    if method is not None:
        stages = _narrowed(str(run), "method", method.lower(), stages, _method)
    if phase is not None:
        stages = _narrowed(str(run), "stage", phase, stages, lambda s: s.phase)
    if len(keeps := _different(stages, _keep_fraction)) > 1:
        raise ValueError(f"{run} has several networks; give keep_fraction, one of {', '.join(keeps)} (1 is dense)")
    return next((s for s in reversed(stages) if _method(s) == "hydra"), stages[-1])


def _narrowed(run: str, key: str, value: str, stages: list[Stage], name: Callable[[Stage], str]) -> list[Stage]:
    """The stages that are called `value`."""
    found = [stage for stage in stages if name(stage) == value]
    if not found:
        keeps = _different(stages, _keep_fraction)
        where = f" at keep_fraction {keeps[0]}" if len(keeps) == 1 else ""
        raise ValueError(f"{run} has no {key} {value}{where}; there is {', '.join(_different(stages, name))}")
    return found


def _different(stages: list[Stage], name: Callable[[Stage], str]) -> list[str]:
    return list(dict.fromkeys(map(name, stages)))


def _keep_fraction(stage: Stage) -> str:
    return canonical_decimal(DENSE if stage.keep_fraction is None else stage.keep_fraction)


def _method(stage: Stage) -> str:
    return NETWORK_OF_PHASE[stage.phase].lower()


def _spelled(keep_fraction: float | str | Decimal) -> str:
    """As in the recipe: 0.10 and 1e-1 are both 0.1."""
    try:
        return canonical_decimal(Decimal(str(keep_fraction)))
    except InvalidOperation:
        return str(keep_fraction)
