"""`python -m launch export`: a finished network as ONNX and torch files that run without this project."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import run_folder
from launch.commands.export_attack import attack_folder, check_file_attack
from launch.exit_codes import print_error
from pipeline.data.loading.prefetch import LoaderError
from pipeline.deployment.formats import FORMATS, STRENGTHS, Format
from pipeline.report.text_table import text_table
from pipeline.run.layout import StageFolder
from pipeline.run.printable import printable_line
from pipeline.run.provenance import load_run_recipe

if TYPE_CHECKING:
    from pipeline.deployment.card import Card

EXAMPLE = """\
Write a finished network as files that run without this project, each beside a compressed copy (.gz):

  onnx        float32, for ONNX Runtime, OpenVINO, TensorRT: normalisation inside, BatchNorm folded
  onnx-int8   int8 weights, in which pruned connections stay zero; ranges from held-out training images
  torch       a torch.export program: torch.export.load(FILE).module()

Input: images, float32 [n, 3, height, width] in [0, 1], any n. Output: logits. Each float32 file is compared with the
network before it is kept. Of a run, HYDRA's network is taken, or --method's. README.md and card.json beside the
files say what they are and what was measured; `verify` checks them on another machine.

--attack attacks the int8 file itself (without it the float32 one) on test images: along the gradients of a twin, by the
network's adversarial examples, and by Square, without gradients. The card gets its robust accuracy, compared with
the network's, and is stamped unless the file masks its gradient. standard has AutoAttack's budgets; reduced has 20
iterations, 3 targets, 200 queries, and APGD alone on the network.

  %(prog)s demo --keep 0.01
  %(prog)s demo --keep 0.01 --attack reduced --images 300
  %(prog)s runs/demo/keep-0.01/magnitude/model.safetensors --format onnx torch
"""
KEPT = "what was complete is kept; the same command continues"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a finished network as ONNX (float32, int8) and torch files",
        description=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", metavar="RUN|FILE", help="a run, or a model.safetensors")
    parser.add_argument("--keep", metavar="K", help="a run's network of this keep_fraction (1: dense)")
    parser.add_argument("--method", metavar="M", help="a run's network of this method, such as magnitude")
    parser.add_argument(
        "--format", nargs="+", choices=FORMATS, default=FORMATS, metavar="F", help=f"of {', '.join(FORMATS)}; all"
    )
    parser.add_argument("--out", type=Path, help="folder to write to (default: export/ beside the network)")
    parser.add_argument("--attack", choices=STRENGTHS, help="attack the file, with these budgets")
    parser.add_argument("--images", default="all", help="number of test images, evenly spread, or all (default)")
    parser.set_defaults(handler=_export, after_interrupt=KEPT)


def _export(arguments: argparse.Namespace) -> int:
    try:
        _write_files(arguments)
    except LoaderError as error:  # not a usage error: no ValueError
        print_error(f"{error}; {KEPT}")
        return 1
    return 0


def _write_files(arguments: argparse.Namespace) -> None:
    """Errors: ValueError; LoaderError if reading images fails."""
    from pipeline.deployment.folder import export_network
    from pipeline.evaluation.load import load_network

    path = Path(arguments.target)
    target = path if path.suffix == ".safetensors" else run_folder.find_run(arguments.target)
    network = load_network(target, arguments.keep, method=arguments.method)
    folder = arguments.out or StageFolder(network.file.parent).export
    formats: tuple[Format, ...] = tuple(name for name in FORMATS if name in arguments.format)
    recipe = load_run_recipe(network.run) if network.run else None
    if arguments.attack:
        check_file_attack(recipe, network.run, formats, arguments.images)
    elif arguments.images != "all":
        raise ValueError(f"--images {arguments.images} is for --attack")
    card = export_network(network, recipe, formats, folder)
    source = network.file.stat().st_size
    rows = [["file", "bytes", "compressed", "of the safetensors file"]]
    for file in card.files:
        share = f"1/{source / file.compressed:.1f}"
        rows.append([printable_line(str(folder / file.name)), f"{file.size:,}", f"{file.compressed:,}", share])
    print(text_table(rows, left=["file"]), flush=True)
    if arguments.attack:
        assert recipe is not None
        _show_attack(attack_folder(folder, card, network, recipe, arguments.attack, arguments.images))


def _show_attack(card: Card) -> None:
    """Print accuracies of file and network, and the stamp."""
    attack = card.attack
    assert attack is not None
    file = card.file(attack.file_sha256)
    accuracies = {
        file.name if file else "file": (attack.clean_accuracy, attack.robust_accuracy),
        "float32 network": (attack.network_clean_accuracy, attack.network_robust_accuracy),
    }
    rows = [[f"{attack.images:,} images", "clean", "95 %", "robust", "95 %"]]
    for name, values in accuracies.items():
        cells = [(f"{100 * a.value:.1f} %", f"{100 * a.low:.1f} to {100 * a.high:.1f}") for a in values]
        rows.append([name, *cells[0], *cells[1]])
    test = attack.robust_comparison
    print(f"\n{text_table(rows, left=[rows[0][0]])}")
    print(
        f"robust: {100 * test.difference:+.1f} points ({100 * test.low:+.1f} to {100 * test.high:+.1f}), McNemar's "
        f"p = {test.p_value:.2g}; first broken by {', '.join(f'{k} {n}' for k, n in (attack.broken_by or {}).items())}"
    )
    print("\n".join(f"not stamped: {doubt}" for doubt in attack.doubts) or "stamped")
