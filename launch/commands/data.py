"""`python -m launch data write|verify|info`: FFCV files from data sets as their authors distribute them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.commands.data_description import print_info, print_written
from launch.exit_codes import print_error
from pipeline.recipe.sections import DATASETS
from pipeline.run.printable import printable_line

if TYPE_CHECKING:
    from pipeline.data.sources.image_folder import FolderOptions

WRITE = """\
Write train.beton and test.beton (FFCV), each with a manifest of hashes, counts and classes beside it.

  %(prog)s fashion_mnist --out data/fashion_mnist
  %(prog)s cifar10 --extra ti_500K_pseudo_labeled.pickle --out data/cifar10_extra
  %(prog)s imagenet --source /data/ilsvrc2012 --out data/imagenet
  %(prog)s image_folder --source /data/birds --classes robin,wren --out data/two_birds

fashion_mnist      --source: a folder with its four idx files. Without it: Debian's package dataset-fashion-mnist if
                   installed, else a download.
cifar10, cifar100  --source: the authors' python archive, or the folder it unpacks to. Without it: a download.
svhn               --source: a folder with train_32x32.mat and test_32x32.mat. Without it: a download.
imagenet           --source: a folder with the three official archives (ILSVRC2012_img_train.tar, _img_val.tar and
                   _devkit_t12.tar.gz), which are read without being unpacked, or with train/ and val/.
image_folder       --source: any tree DIR/train/<class>/<image> and DIR/val/<class>/<image>; val becomes test. Or, with
                   --val-fraction, DIR/<class>/<image>.

--classes keeps only these classes, numbered from 0 in the order given; @FILE reads one name per line.
--extra appends pseudo-labelled images to the training images: a .pickle with data and extrapolated_targets (Carmon et
al.), a .npz with image and label, or SVHN's extra_32x32.mat. The recipe's data.extra_fraction sets their share of every
micro-batch.

Of a folder tree, hidden files and folders, those that programs leave behind (@eaDir, __MACOSX), and files that are no
images by their extension are passed over and counted. Of a GIF the first frame is read; HEIC needs pillow-heif.

Every image is decoded before anything is written. Grey, CMYK and misnamed images are converted to RGB. If any cannot be
decoded, all of them are listed and nothing is written, unless --skip-broken is given. Images of up to 64 x 64 pixels
are stored bit-exact, larger ones as JPEG. An existing file from the same source is left unchanged.
"""
VERIFY = """\
Read a file completely: check every byte against the hashes in its manifest, and decode every image.

  %(prog)s data/imagenet/train.beton

Exit code 0 if it is intact, 1 if it is damaged (all damaged samples are listed), 2 if there is no such file.
"""
INFO = """\
Describe a file: counts per class, image sizes, source, conversions, hashes.

  %(prog)s data/fashion_mnist/train.beton
"""
SHOWN_SAMPLES = 100
Progress = Callable[[str, int, int], None]


def add_parser(subparsers: Any) -> None:
    data = subparsers.add_parser("data", help="write, verify and describe data files (FFCV)")
    commands = data.add_subparsers(required=True, metavar="COMMAND")

    write = _command(commands, "write", "write the data files of a data set", WRITE, _write)
    write.add_argument("dataset", choices=DATASETS)
    write.add_argument("--source", type=Path, metavar="DIR", help="where the images are (see above)")
    write.add_argument("--classes", metavar="A,B|@FILE", help="only these classes (default: all)")
    write.add_argument(
        "--extra", type=Path, metavar="FILE", help="pseudo-labelled images to add to the training images"
    )
    write.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder for train.beton and test.beton")
    write.add_argument(
        "--workers", type=int, metavar="N", help="number of writer processes (default: one per usable core)"
    )
    write.add_argument(
        "--max-resolution",
        type=int,
        default=500,
        metavar="PX",
        help="downscale images whose longer side exceeds this (default: %(default)s)",
    )
    write.add_argument(
        "--quality", type=int, default=90, help="JPEG quality of larger images, 1 to 100 (default: %(default)s)"
    )
    write.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out images that cannot be decoded, and record them in the manifest",
    )
    own = write.add_argument_group("for image_folder")
    own.add_argument(
        "--background",
        metavar="COLOUR",
        help="behind transparent pixels: a name, #rrggbb, or none for the colours that they hide (default: white)",
    )
    own.add_argument(
        "--exif-rotate", action="store_true", help="turn photographs as their EXIF says (default: only count them)"
    )
    own.add_argument(
        "--val-fraction",
        metavar="SHARE",
        help="without val/: hold out this share of every class's images as the test set, for example 0.2",
    )
    write.add_argument("--force", action="store_true", help="replace existing files")
    write.set_defaults(after_interrupt="no unfinished file is left; run the same command again")

    verify = _command(commands, "verify", "check every byte and image of a data file", VERIFY, _verify)
    verify.add_argument("file", type=Path, metavar="FILE")
    info = _command(commands, "info", "describe a data file", INFO, _info)
    info.add_argument("file", type=Path, metavar="FILE")


def _command(
    commands: Any, name: str, summary: str, description: str, handler: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(handler=handler)
    return parser


def class_list(value: str | None) -> tuple[str, ...]:
    """Names from 'a,b', or from the lines of FILE for '@FILE'; () for None. Errors: DataError if none is named."""
    from pipeline.data.manifest import DataError

    if value is None:
        return ()
    try:
        entries = Path(value[1:]).read_text(encoding="utf-8-sig").splitlines() if value[:1] == "@" else value.split(",")
    except (OSError, ValueError) as error:
        raise DataError(f"--classes {value}: {error}") from None
    names = tuple(name.strip() for name in entries if name.strip())
    if not names:
        raise DataError(f"--classes {value!r} names no class; write --classes a,b or @FILE with one name per line")
    return names


def _folder_options(arguments: argparse.Namespace) -> FolderOptions:
    """Errors: DataError for a colour or share that is none."""
    from pipeline.data.manifest import DataError
    from pipeline.data.sources.decode import Rendering, parse_colour
    from pipeline.data.sources.image_folder import FolderOptions
    from pipeline.recipe.fields import parse_fraction

    own = arguments.dataset == "image_folder"  # other data sets keep their authors' pixels
    colour = arguments.background or ("white" if own else "none")
    option = f"--background {colour}"
    try:
        background = None if colour == "none" else parse_colour(colour)
        option = f"--val-fraction {arguments.val_fraction}"
        share = None if arguments.val_fraction is None else parse_fraction(arguments.val_fraction)
    except ValueError as error:
        raise DataError(f"{option}: {error}") from None
    return FolderOptions(Rendering(background, arguments.exif_rotate), share)


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """A bar per stage on a terminal; elsewhere a line when a stage starts."""
    from tqdm import tqdm

    current_stage = ""
    bar: Any = None

    def update(stage: str, done: int, total: int) -> None:
        nonlocal current_stage, bar
        if not sys.stderr.isatty():
            if stage != current_stage:
                print(f"{stage}: {total}", file=sys.stderr, flush=True)
        else:
            if stage != current_stage and bar is not None:
                bar.close()
            if stage != current_stage or bar is None:
                bar = tqdm(total=total, desc=stage, unit="", dynamic_ncols=True)
            bar.update(done - bar.n)
        current_stage = stage

    try:
        yield update
    finally:
        if bar is not None:
            bar.close()


def _write(arguments: argparse.Namespace) -> int:
    from pipeline.data.manifest import DataError
    from pipeline.data.writing.process import WriteError
    from pipeline.data.writing.write import WriteOptions, write_dataset

    try:
        options = WriteOptions(
            workers=arguments.workers,
            max_resolution=arguments.max_resolution,
            jpeg_quality=arguments.quality,
            skip_broken=arguments.skip_broken,
        )
        with shown_progress() as progress:
            files = write_dataset(
                arguments.dataset,
                arguments.source,
                arguments.out,
                options,
                arguments.force,
                progress,
                classes=class_list(arguments.classes),
                extra=arguments.extra,
                folder=_folder_options(arguments),
            )
    except (DataError, WriteError) as error:
        print_error(error)
        return 2 if isinstance(error, DataError) else 1
    for file in files:
        print_written(file)
    return 0


def _report_error(file: Path, error: ValueError) -> int:
    """Print why a file does not open. Returns the exit code: 2 if it does not exist, 1 if it is damaged."""
    print_error(error)
    return 1 if os.path.isfile(file) else 2  # Path.is_file would raise for a folder that may not be entered


def _verify(arguments: argparse.Namespace) -> int:
    from pipeline.data.manifest import DataError, check_structure, open_checked, read_index
    from pipeline.data.writing.verify import verify_file

    try:
        manifest = open_checked(arguments.file)
        index = read_index(arguments.file, check_structure(arguments.file))
        with shown_progress() as progress:
            damage = verify_file(arguments.file, progress)
    except DataError as error:
        return _report_error(arguments.file, error)
    if not damage.damaged:
        print(f"{arguments.file}: intact; {manifest.num_samples} images, content {manifest.content_sha256}")
        return 0
    print(f"{arguments.file}: DAMAGED")
    for sample, reason in list(damage.samples.items())[:SHOWN_SAMPLES]:
        label = int(index.samples["label"][sample])
        print(printable_line(f"  sample {sample} (class {label}, {manifest.class_names[label]}): {reason}"))
    if len(damage.samples) > SHOWN_SAMPLES:
        print(f"  and {len(damage.samples) - SHOWN_SAMPLES} more samples")
    if damage.pages:
        print(f"  8 MiB pages that differ: {', '.join(map(str, damage.pages))}")
    for name in damage.manifest:
        print(f"  the manifest itself is damaged: its {name} differs from that of the file, whose bytes are intact")
    print("write it again with `python -m launch data write ... --force`, or copy it again")
    return 1


def _info(arguments: argparse.Namespace) -> int:
    from pipeline.data.manifest import DataError, check_structure, open_checked, read_index

    try:
        manifest = open_checked(arguments.file)
        samples = read_index(arguments.file, check_structure(arguments.file)).samples
    except DataError as error:
        return _report_error(arguments.file, error)
    print_info(arguments.file, manifest, samples)
    return 0
