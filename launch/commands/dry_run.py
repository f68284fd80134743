"""`run --dry-run`: what a recipe would do, and everything that would stop it, without starting anything."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch import run_folder
from pipeline.data.loading import sampling
from pipeline.data.manifest import Manifest, read_manifest
from pipeline.recipe.file import load_resolved_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import Stage, stages_of
from pipeline.run.disk import free_bytes, readable
from pipeline.run.files import read_rows
from pipeline.run.layout import RunFolder, StageFolder, is_done

Cost = tuple[float, float]
"""(seconds of training per image, held-out images included; seconds of evaluating the finished network)"""


def plan_lines(recipe: Recipe, name: str | None, with_torch: bool) -> tuple[list[str], list[str]]:
    """(lines that describe the run, problems that would stop it). Without torch, the network is not built."""
    problems: list[str] = []

    def checked(check: Any, *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except ValueError as error:
            problems.append(str(error))
            return None

    folder = run_folder.RUNS / (name or recipe.name)
    checked(run_folder.check_start, recipe, name)
    manifest = read_manifest(Path(recipe.data.train_file)) if checked(run_folder.check_data, recipe) else None
    per_epoch = checked(_steps_per_epoch, recipe, manifest) if manifest is not None else None
    weights = checked(run_folder.network_size, recipe) if with_torch and not problems else None

    stages = stages_of(recipe)
    images = run_folder.train_images(recipe, manifest) if manifest is not None and per_epoch is not None else 0
    remembered = [images * stage.objective.remembered_bytes(recipe.data.image_size) for stage in stages]
    done = [stage for stage in stages if is_done(folder, stage)] if RunFolder(folder).recipe.exists() else None
    state = "new" if done is None else f"exists: {len(done)} of {len(stages)} stages are finished"
    lines = [f"{folder} ({state})"]
    if manifest is not None and per_epoch is not None:
        lines.append(_data_line(recipe, manifest, per_epoch))
    width = max(len(stage.name) for stage in stages)
    lines.append("stages, in order:")
    lines += [f"  {stage.name:<{width}}  {_stage_text(recipe, stage, per_epoch)}" for stage in stages]
    labels = ", ".join(dict.fromkeys(label for stage in stages for label in stage.evaluations))
    tested = "all" if recipe.evaluation.images is None else f"{recipe.evaluation.images:,}"
    lines.append(
        f"evaluated: {sum(bool(stage.measure) for stage in stages)} networks, by {labels} ({tested} test images)"
    )
    if any(remembered):
        lines.append(f"memory: {readable(max(remembered))} per worker, for perturbations; they are in checkpoints too")
    if weights is not None:
        free = free_bytes(folder.absolute())
        room = "" if free is None else f" of {readable(free)} that are free"
        needed = readable(run_folder.disk_bytes(recipe, stages, weights, remembered))
        lines.append(f"disk: about {needed}{room}, for checkpoints and networks")
    left = [stage for stage in stages if stage not in (done or [])]
    if per_epoch is not None and left:
        lines.append(_time_line(recipe, left, per_epoch))
    return lines, problems


def _steps_per_epoch(recipe: Recipe, manifest: Manifest) -> int:
    """Steps of one pass over the data; replays make more."""
    images = run_folder.train_images(recipe, manifest)
    return sampling.steps_per_epoch(images, recipe.batch.batch_per_step, recipe.extra_per_step)


def _data_line(recipe: Recipe, manifest: Manifest, per_epoch: int) -> str:
    return (
        f"{run_folder.train_images(recipe, manifest):,} training images, {recipe.data.validation_images:,} held out, "
        f"{manifest.num_classes} classes; {per_epoch:,} steps of {recipe.batch.batch_per_step:,} images per epoch"
    )


def _images(recipe: Recipe, stage: Stage, per_epoch: int) -> int:
    steps = per_epoch * stage.objective.steps_per_batch * stage.epochs
    return steps * recipe.batch.batch_per_step


def _stage_text(recipe: Recipe, stage: Stage, per_epoch: int | None) -> str:
    phase, weights = stage.trained_by, recipe.model.weights if stage.keep_fraction is None else None
    if stage.trials:
        images = f"{recipe.data.validation_images:,} held-out images"
        return f"the best of its {len(stage.trials)} trials, by robust accuracy on {images}"
    if phase is None:
        return f"the weights of {weights}, as they are"
    start = f"from {stage.starts_from or weights or 'scratch'}"
    if weights is not None and recipe.model.weights_head == "new":
        start += " with a new last layer"
    line = f"{phase.epochs:>3} epochs  lr {phase.lr:<7g} trains {stage.trains}, {start}"
    if per_epoch is None:
        return line
    images, passes = _images(recipe, stage, per_epoch), stage.objective.passes_per_step
    passes = None if passes is None else passes + stage.extra_passes
    cost = "bounds" if passes is None else f"{passes} passes" if passes > 1 else "1 pass"
    return f"{line}; {images // recipe.batch.batch_per_step:,} steps, {images:,} images, {cost} each"


def _time_line(recipe: Recipe, stages: list[Stage], per_epoch: int) -> str:
    measured: dict[str, Cost] = {}
    runs = []
    for folder, costs in _measured_runs(recipe):
        if new := {key: cost for key, cost in costs.items() if key not in measured}:
            measured |= new
            runs.append(str(folder))
    keys = {stage.name: _cost_key(recipe, stage) for stage in stages}
    missing = [name for name, key in keys.items() if key not in measured]
    if missing:
        return f"time: unknown, as no run in {run_folder.RUNS}/ has measured {', '.join(missing)}"
    seconds = sum(
        _images(recipe, stage, per_epoch) * measured[keys[stage.name]][0]
        + (measured[keys[stage.name]][1] if stage.measure else 0.0)
        for stage in stages
    )
    return f"time: about {timedelta(seconds=round(seconds))}, as measured in {', '.join(runs)}"


def _cost_key(recipe: Recipe, stage: Stage) -> str:
    """What the time per image of a stage depends on."""
    values = recipe.model_dump(mode="json", include={"threat_model", "batch", "workers", "engine", "evaluation"})
    model, phase = {"arch": recipe.model.arch, "classes": recipe.model.num_classes}, stage.trained_by
    training = None if phase is None else (phase.resolution, stage.objective, phase.optimizer)
    return repr((values, model, recipe.data.image_size, recipe.data.dataset, stage.phase, training))


def _measured_runs(recipe: Recipe) -> Iterator[tuple[Path, dict[str, Cost]]]:
    """The runs here, newest first, with what they measured; damaged ones are passed over."""
    newest = sorted(run_folder.RUNS.glob("*/recipe.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest:
        try:
            earlier = load_resolved_recipe(path)
            costs = {
                _cost_key(earlier, stage): cost
                for stage in stages_of(earlier)
                # What a trial took is also known from the stage that chose it, which is evaluated, too.
                if (stage.trial_of is None or stage.section == "prune")
                and is_done(path.parent, stage)
                and (cost := _measured_cost(path.parent, stage)) is not None
            }
        except (OSError, ValueError):  # the run's own commands say what is wrong with it
            continue
        yield path.parent, costs


def _measured_cost(run: Path, stage: Stage) -> Cost | None:
    folder = StageFolder(run / stage.name)
    try:
        rows = read_rows(folder.metrics) if stage.trained_by else []
        images = sum(row["images"] for row in rows if row["kind"] == "train")
        seconds = sum(row["timing"]["seconds"] for row in rows)
    except (KeyError, TypeError):
        return None
    written = [folder.evaluation(label).stat().st_mtime for label in stage.evaluations]
    evaluation = max(written) - folder.result.stat().st_mtime if written else 0.0
    if stage.trained_by is None:
        return 0.0, max(evaluation, 0.0)
    return (seconds / images, max(evaluation, 0.0)) if images else None
