"""What a card says of a network, gathered from its file and its run."""

from __future__ import annotations

from pipeline.deployment.card import Card, ExportedFile, MeasuredSpeed, NetworkEvaluation, Training
from pipeline.evaluation.load import LoadedNetwork
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.benchmark import Benchmark
from pipeline.run.files import sha256_of
from pipeline.run.layout import RunFolder
from pipeline.run.records import Provenance


def describe(
    network: LoadedNetwork, recipe: Recipe | None, size: int, files: list[ExportedFile], others: dict[str, str]
) -> Card:
    """`size` is that of its images in pixels; `recipe` that of its run; `others`: name -> hash of the files beside it.

    Errors: ValueError naming a damaged file of the run.
    """
    model_sha256 = sha256_of(network.file)
    return Card(
        network=network.metadata,
        model_sha256=model_sha256,
        image_size=size,
        files=tuple(files),
        others_sha256=others,
        training=_training(network, recipe) if recipe is not None else None,
        evaluation=_evaluation(network),
        speeds=_speeds(network, model_sha256),
    )


def _training(network: LoadedNetwork, recipe: Recipe) -> Training:
    assert network.run is not None
    name = network.file.resolve().parent.relative_to(network.run).as_posix()
    stage = next((stage for stage in stages_of(recipe) if stage.name == name), None)
    provenance = Provenance.read_if_there(RunFolder(network.run).provenance) or Provenance()
    return Training(
        run=recipe.name,
        method=stage.title if stage else "unknown",
        dataset=recipe.data.dataset,
        objective=recipe.objective.name,
        threat_model=f"{recipe.threat_model.norm} {recipe.threat_model.eps}" if recipe.threat_model else None,
        recipe_sha256=provenance.recipe_sha256 or network.metadata.get("recipe_sha256") or "unknown",
        data_sha256=provenance.data_sha256 or {},
        commit=provenance.commit,
    )


def _evaluation(network: LoadedNetwork) -> NetworkEvaluation | None:
    result = network.evaluation
    if result is None:
        return None
    return NetworkEvaluation(
        title=result.title,
        images=result.images,
        clean_accuracy=result.clean_accuracy,
        robust_accuracy=result.robust_accuracy,
        honesty=result.honesty,
    )


def _speeds(network: LoadedNetwork, model_sha256: str) -> tuple[MeasuredSpeed, ...]:
    """Of the network's files, where `launch benchmark` has measured this very network of the run."""
    benchmark = Benchmark.read_if_there(RunFolder(network.run).benchmark) if network.run is not None else None
    if benchmark is None:
        return ()
    return tuple(
        MeasuredSpeed(
            name=f"{entry.file}, {entry.title}",
            milliseconds=speed.milliseconds,
            times_as_fast=speed.times_as_fast.median,
            machine=f"{benchmark.processor}, beside {benchmark.reference}",
        )
        for entry in benchmark.of_network(model_sha256)
        if (speed := entry.speed(batch=1, threads=1)) is not None
    )
