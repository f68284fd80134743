"""`python -m launch evaluate`: evaluates finished networks under other attacks, attack strengths or images."""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import run_folder
from launch.exit_codes import print_error
from pipeline.data.loading.prefetch import LoaderError
from pipeline.recipe.attacks import ATTACKS, FOLLOWING, STEPPING, Attack, check_attack
from pipeline.recipe.fields import parse_fraction
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.files import sha256_of
from pipeline.run.layout import RunFolder, StageFolder
from pipeline.run.provenance import load_run_recipe
from pipeline.run.records import StageResult

if TYPE_CHECKING:
    from pipeline.data.loading.image_list import ListedImages
    from pipeline.data.loading.loader import Loader
    from pipeline.evaluation.measures.pgd import Pgd
    from pipeline.evaluation.spec import EvaluationSpec

EXAMPLE = """\
Evaluate the finished networks of a run under the threat model of its recipe. Prints one line of JSON per network, and
writes the result and the verdict of each image to evaluate/ beside the network.

  %(prog)s runs/demo/keep-0.01/finetune/model.safetensors --steps 50 --restarts 10 --images 1000
  %(prog)s demo --attack autoattack --images 1000    (every finished network of the run)
  %(prog)s first --attack autoattack --folder val --image-list imagenet_test_image_ids.txt
"""
KEPT = "finished chunks are kept; the same command continues with the next one"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="evaluate finished networks under other attacks, attack strengths or images; prints JSON",
        description=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="RUN|FILE", help="a run, or a model.safetensors inside one")
    names = f"one or more of {', '.join(ATTACKS)} (default: pgd)"
    parser.add_argument("--attack", default="pgd", type=_names, metavar="A[,A]", help=names)
    parser.add_argument("--images", default="all", help="number of test images, evenly spread, or all (default)")
    parser.add_argument("--steps", type=int, help="steps of pgd and transfer (default: the recipe's)")
    parser.add_argument("--restarts", type=int, help="random restarts of pgd and transfer (default: the recipe's)")
    parser.add_argument(
        "--step-size", type=_pixels, help="step size of pgd and transfer, for example 1/255 (default: the recipe's)"
    )
    parser.add_argument(
        "--source",
        type=Path,
        help="network that transfer computes its adversarial examples on (default: the run's dense one)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="evaluate on image files in one folder per class, as leaderboards do, not on the test file",
    )
    parser.add_argument(
        "--image-list", type=Path, metavar="FILE", help="the images of --folder to use: one <class>/<file> per line"
    )
    parser.set_defaults(handler=_evaluate, after_interrupt=KEPT)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in ATTACKS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(ATTACKS)}")
    return names


def _pixels(text: str) -> Fraction:
    try:
        return parse_fraction(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run_of(path: Path) -> Path:
    for folder in path.resolve().parents:
        if RunFolder(folder).recipe.exists():
            return folder
    raise ValueError(f"{path} is not inside a run: no recipe.yaml above it names its threat model and data")


def _targets(target: str) -> tuple[Path, list[Path]]:
    """The run, and the network files of it to evaluate."""
    path = Path(target)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        return _run_of(path), [path]
    folder = run_folder.find_run(target)
    stages = [stage for stage in stages_of(load_run_recipe(folder)) if stage.measure is not None]
    files = [path for stage in stages if (path := StageFolder(folder / stage.name).network).exists()]
    if not files:
        raise ValueError(f"{folder} has no finished network yet; continue with: python -m launch resume {folder}")
    return folder, files


def _attack(name: str, arguments: argparse.Namespace, recipe: Recipe) -> Attack:
    """An attack with the options of the command line. Errors: ValueError for options that it does not support."""
    images = arguments.images
    if images != "all" and (not images.isdigit() or int(images) == 0):
        raise ValueError(f"--images {images}: expected all or a number")
    options = {"steps": arguments.steps, "restarts": arguments.restarts, "step_size": arguments.step_size}
    options = {key: value for key, value in options.items() if value is not None}
    if min(options.values(), default=1) <= 0:
        raise ValueError("--steps, --restarts and --step-size must be positive")
    if options and name not in STEPPING:
        raise ValueError(f"--attack {name} runs with its authors' settings: no --steps, --restarts, --step-size")
    if arguments.source is not None and "transfer" not in arguments.attack:
        raise ValueError(f"--source {arguments.source} is for --attack transfer")
    attack = Attack.model_validate({"name": name, "images": None if images == "all" else int(images), **options})
    if recipe.threat_model is not None or attack.name != "pgd":  # without a threat model, pgd measures clean accuracy
        usual, classes = recipe.evaluation.step_size, recipe.model.num_classes
        check_attack(attack, "--attack", recipe.objective, recipe.threat_model, classes, usual)
    return attack


def _evaluate(arguments: argparse.Namespace) -> int:
    try:
        _run_attacks(arguments)
    except LoaderError as error:  # not a usage error: no ValueError
        print_error(f"{error}; {KEPT}")
        return 1
    except RuntimeError as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        from pipeline.distributed import failure_text

        print_error(f"{failure_text(error)}; {KEPT}")
        return 1
    return 0


def _run_attacks(arguments: argparse.Namespace) -> None:
    """Print the result of every attack on every network. Errors: ValueError; LoaderError if reading images fails."""
    folder, files = _targets(arguments.target)
    run_folder.check_same_data(folder)
    recipe = load_run_recipe(folder)
    attacks = [_attack(name, arguments, recipe) for name in arguments.attack]

    from launch.commands.evaluation_cache import EvaluationCache
    from pipeline.distributed import Group, make_deterministic, pick_device
    from pipeline.evaluation.images import EvaluationImages
    from pipeline.evaluation.spec import evaluation_spec
    from pipeline.models.exported_counts import check_exported

    source = arguments.source or StageFolder(folder / "pretrain").network
    for path in {*files, source}:
        result = StageResult.read_if_there(StageFolder(path.parent).result)
        if result is not None and path == StageFolder(path.parent).network:
            check_exported(path, result)
    device = pick_device(recipe.workers.device)
    with _open_images(arguments, recipe) as loader:
        make_deterministic(recipe.workers.threads)  # also restores the thread count, which importing FFCV changes
        if arguments.images != "all" and int(arguments.images) > loader.num_samples:
            raise ValueError(f"--images {arguments.images}: expected all or a number from 1 to {loader.num_samples}")
        images = EvaluationImages.all_of(loader, recipe.data.augmentation)
        cache = EvaluationCache(folder, recipe, images, Group(0, 1, device))
        specs = [
            (evaluation_spec(recipe, attack, source, device), _networks_of(attack, files, source)) for attack in attacks
        ]
        for attack, (spec, networks) in zip(attacks, specs, strict=True):
            pgd = _pgd_to_check(attack, spec, recipe)
            for path in networks:
                honesty = None if pgd is None else cache.check_honesty(path, pgd, spec.images)
                result = cache.evaluate(path, spec, honesty)
                print(json.dumps({"file": str(path), **result.to_json()}), flush=True)


def _pgd_to_check(attack: Attack, spec: EvaluationSpec, recipe: Recipe) -> Pgd | None:
    """The PGD that the honesty checks of an attack use; None where they do not apply."""
    from pipeline.evaluation.measures.pgd import Pgd
    from pipeline.evaluation.spec import recipe_measure

    if recipe.threat_model is None or attack.name not in FOLLOWING or not recipe.evaluation.honesty_images:
        return None
    measure = spec.measure if attack.name == "pgd" else recipe_measure(recipe)
    return measure if isinstance(measure, Pgd) else None


def _networks_of(attack: Attack, files: list[Path], source: Path) -> list[Path]:
    """The networks to attack: without the source of transfer. Errors: ValueError if none is left."""
    if attack.name != "transfer":
        return files
    source_sha256 = sha256_of(source)
    others = [path for path in files if sha256_of(path) != source_sha256]
    if not others:
        raise ValueError(f"{source} is the network under attack itself; name another one: --source FILE")
    return others


def _open_images(arguments: argparse.Namespace, recipe: Recipe) -> Loader | ListedImages:
    """The recipe's test file, or the images of --folder and --image-list. Errors: ValueError."""
    from pipeline.data.loading.image_list import CROPPED, ListedImages
    from pipeline.data.loading.loader import Loader
    from pipeline.data.manifest import read_manifest

    data, threads = recipe.data, recipe.workers.threads
    folder, image_list = arguments.folder, arguments.image_list
    if (folder is None) != (image_list is None):
        raise ValueError("--folder and --image-list go together: where the images are, and which of them to use")
    if folder is None:
        return Loader(Path(data.test_file), image_size=data.image_size, threads=threads)
    if data.image_size != CROPPED:
        raise ValueError(
            f"--folder gives images of {CROPPED} x {CROPPED} pixels, and the network was trained on {data.image_size} "
            "(data.image_size)"
        )
    return ListedImages(folder, image_list, read_manifest(Path(data.test_file)).class_names, threads=threads)
