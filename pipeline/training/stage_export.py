"""The result of a trained stage: its exported network, and result.json, which commits it."""

from __future__ import annotations

from typing import Any

from pipeline.data.loading.preprocessing import Preprocessing
from pipeline.data.manifest import read_manifest
from pipeline.models import Network
from pipeline.models.export import write_model
from pipeline.models.pruning.scores import Scores
from pipeline.models.state import effective_state, layer_counts
from pipeline.recipe.file import recipe_hash
from pipeline.recipe.stages import Stage
from pipeline.run.files import atomic_write_json, sha256_of
from pipeline.run.layout import StageFolder
from pipeline.run.lease import check_token
from pipeline.run.progress import Progress
from pipeline.training.context import RunContext
from pipeline.training.trials import held_out_robust_accuracy


def usage_metadata(context: RunContext) -> dict[str, Any]:
    """What one needs beside the weights to use an exported network, for its metadata; a function of recipe and data.

    Accuracies are not known yet, and the file must not change after its hash is in result.json.
    """
    recipe, manifest = context.recipe, read_manifest(context.recipe.data.test_file)
    return {
        "class_names": context.loader(recipe.data.train_file).class_names,
        "threat_model": recipe.threat_model.model_dump(mode="json") if recipe.threat_model else None,
        "preprocessing": Preprocessing.of(manifest, recipe.data.image_size, recipe.data.augmentation).to_json(),
    }


def write_result(
    context: RunContext, stage: Stage, network: Network, scores: Scores | None, progress: Progress, selected: int
) -> None:
    """Write model.safetensors, then result.json, of a network that has the state of step `selected`.

    Errors: LeaseHeld if another process has taken the stage.
    """
    recipe, folder = context.recipe, context.folder(stage)
    files, keep = StageFolder(folder), stage.describe(progress.steps_per_epoch)["keep_fraction"]
    facts = {
        "keep_fraction": keep,
        "mask_sha256": scores.mask_sha256() if scores is not None else None,
        "recipe_sha256": recipe_hash(recipe),
        "image_size": recipe.data.image_size,
        **usage_metadata(context),
    }
    if stage.structure != "unstructured":
        facts["structure"] = stage.structure
    write_model(files.network, effective_state(network), recipe.model, facts)
    check_token(folder, context.token)
    result = {
        "stage": stage.name,
        "phase": stage.phase,
        "keep_fraction": keep,
        "steps": progress.step,
        "selected_step": selected,
        "model_sha256": sha256_of(files.network),
        "mask_sha256": facts["mask_sha256"],
        "layers": layer_counts(network),
    }
    if stage.trial_of is not None and stage.section == "finetune":
        result["held_out_robust_accuracy"] = held_out_robust_accuracy(folder, selected)
    atomic_write_json(files.result, result)
