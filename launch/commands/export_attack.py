"""The attack of `launch export --attack`: on the int8 file, or the float32 one if there is no other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from launch import run_folder
from pipeline.deployment.formats import FILES, AttackStrength, Format
from pipeline.recipe.attacks import Attack, check_attack

if TYPE_CHECKING:
    from pipeline.deployment.card import Card
    from pipeline.evaluation.load import LoadedNetwork
    from pipeline.recipe.schema import Recipe

CHUNK = 50
"""Images per call: after each the bar advances, and an interrupted attack resumes with the next one."""


def check_file_attack(recipe: Recipe | None, run: Path | None, formats: tuple[Format, ...], images: str) -> None:
    """Errors: ValueError for a network whose files cannot be attacked, and for images that are none."""
    if recipe is None or run is None:
        raise ValueError("--attack needs test images and a threat model, which a file outside a run lacks")
    if images != "all" and (not images.isdigit() or int(images) == 0):
        raise ValueError(f"--images {images}: expected all or a number")
    if formats == ("torch",):
        raise ValueError("--attack is for ONNX files; add onnx or onnx-int8 to --format")
    attack, classes = Attack(name="apgd"), recipe.model.num_classes
    check_attack(attack, "--attack", recipe.objective, recipe.threat_model, classes, recipe.evaluation.step_size)
    run_folder.check_same_data(run)


def attack_folder(
    folder: Path, card: Card, network: LoadedNetwork, recipe: Recipe, strength: AttackStrength, count: str
) -> Card:
    """Attack the folder's file and write the result to its card; the result of the same attack is kept.

    Errors: CannotTwin; ValueError for more images than there are; LoaderError.
    """
    from launch.commands.evaluation_cache import ProgressBar
    from pipeline.data.loading.loader import Loader
    from pipeline.deployment.attack_result import attack_result
    from pipeline.deployment.attacked_file import AttackedFile
    from pipeline.deployment.file_attack import FileAttack
    from pipeline.deployment.folder import write_attack
    from pipeline.distributed import Group, make_deterministic, pick_device
    from pipeline.evaluation.chunks import ChunkStore
    from pipeline.evaluation.images import EvaluationImages
    from pipeline.evaluation.runner import Evaluator
    from pipeline.evaluation.spec import EvaluationSpec

    data, threads = recipe.data, recipe.workers.threads
    file = next((file for file in card.files if file.format == "onnx-int8"), card.files[0])
    device = pick_device(recipe.workers.device)
    assert recipe.threat_model is not None
    with Loader(Path(data.test_file), image_size=data.image_size, threads=threads) as loader:
        make_deterministic(threads)
        if count != "all" and int(count) > loader.num_samples:
            raise ValueError(f"--images {count}: expected all or a number from 1 to {loader.num_samples}")
        images = EvaluationImages.all_of(loader, data.augmentation).spread(None if count == "all" else int(count))
        attacked = AttackedFile(folder / FILES[file.format], threads)
        classes, seed = recipe.model.num_classes, recipe.seed
        measure = FileAttack(attacked, file.sha256, strength, recipe.threat_model, classes, seed)
        spec = EvaluationSpec(measure.name, measure, len(images.ids), CHUNK)
        header = spec.header(images, network.file)
        if card.attack is not None and all(getattr(card.attack, name) == value for name, value in header):
            return card
        store = ChunkStore(folder / "attack.chunks", header.to_json())
        with ProgressBar(f"attack on {file.name}", header.images, CHUNK, None) as bar:
            evaluator = Evaluator(images, Group(0, 1, device), bar)
            verdicts = evaluator.verdicts(network.to(device), measure, CHUNK, store)
        card = write_attack(folder, card, attack_result(header, verdicts), verdicts)
        store.remove()
        return card
