"""Cache of the results of `launch evaluate`, in evaluate/ beside each network."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from tqdm import tqdm

from pipeline.distributed import Group
from pipeline.evaluation.chunks import read_verdicts, write_verdicts
from pipeline.evaluation.honesty.runner import honesty_spec, log_checks, run_honesty_checks, trained_network
from pipeline.evaluation.images import EvaluationImages
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.evaluation.result import EvaluationHeader, EvaluationResult, HonestyResult, HonestySummary, Result
from pipeline.evaluation.runner import EvaluationHooks, Evaluator
from pipeline.evaluation.saved import check_counts
from pipeline.evaluation.spec import EvaluationSpec
from pipeline.models import Network
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.files import atomic_write_json, make_folder
from pipeline.run.layout import StageFolder
from pipeline.run.locks import exclusive

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationCache:
    """Results for the networks of one run on one set of images."""

    run_folder: Path
    recipe: Recipe
    images: EvaluationImages
    group: Group

    def evaluate(self, file: Path, spec: EvaluationSpec, honesty: HonestySummary | None) -> EvaluationResult:
        """The result for a network, from the cache if it is there, with `honesty`.

        Errors: ValueError; LoaderError if reading images fails.
        """
        header = spec.header(self.images, file)
        with self._locked(file, spec, header) as name:
            result = _find(StageFolder(file.parent).evaluations, header, EvaluationResult)
            if result is None:
                with self._bar(file, spec, header) as bar:
                    return Evaluator(self.images, self.group, bar).evaluate(spec, file, name, honesty)
        return result if honesty is None else result.model_copy(update={"honesty": honesty})

    def check_honesty(self, file: Path, pgd: Pgd, images: int | None) -> HonestySummary:
        """The honesty checks of a network under `pgd`; warnings of new checks are logged. Errors: as `evaluate`."""
        spec = honesty_spec(self.recipe, pgd, images or len(self.images.ids))
        header, folder = spec.header(self.images, file), StageFolder(file.parent).evaluations
        result = header.read_if_current(StageFolder(file.parent).honesty, HonestyResult)
        if result is not None:
            return result.summary()
        with self._locked(file, spec, header) as name:
            result = _find(folder, header, HonestyResult)
            if result is None:
                with self._bar(file, spec, header) as bar:
                    evaluator, trained = Evaluator(self.images, self.group, bar), self._trained(file)
                    chunks = folder / f"{name}.chunks"
                    result, verdicts, store = run_honesty_checks(evaluator, spec, file, trained, chunks)
                log_checks(self._stage_name(file), result.checks)
                write_verdicts(folder / f"{name}.parquet", verdicts)
                atomic_write_json(folder / f"{name}.json", result.to_json())
                store.remove()
        return result.summary()

    @contextmanager
    def _locked(self, file: Path, spec: EvaluationSpec, header: EvaluationHeader) -> Iterator[str]:
        """The name of an evaluation's files, under a lock for one process at a time. Errors: ValueError."""
        folder = StageFolder(file.parent).evaluations
        if not os.access(file.parent, os.W_OK):
            raise ValueError(f"{file.parent} is not writable, and verdicts are written there; make a copy of the run")
        make_folder(folder)
        # With a digest, so that it differs from the files that the run itself writes.
        digest = hashlib.sha256(json.dumps(header.to_json(), sort_keys=True).encode()).hexdigest()
        name = f"{spec.label}-{digest[:8]}"
        with exclusive(folder / f".{name}.lock"):
            yield name

    def _bar(self, file: Path, spec: EvaluationSpec, header: EvaluationHeader) -> ProgressBar:
        return ProgressBar(f"{file.parent.name}: {spec.label}", header.images, spec.chunk, spec.passes)

    def _trained(self, file: Path) -> Network | None:
        """The network that a finished stage exported to this file; None for other files."""
        name = self._stage_name(file)
        stage = next((stage for stage in stages_of(self.recipe) if stage.name == name), None)
        if stage is None or not StageFolder(file.parent).result.exists():
            return None
        return trained_network(self.recipe, file.parent, stage)

    def _stage_name(self, file: Path) -> str:
        return file.parent.resolve().relative_to(self.run_folder.resolve()).as_posix()


def _find(folder: Path, header: EvaluationHeader, kind: type[Result]) -> Result | None:
    """The result of an earlier evaluation with this header that has its verdicts; damaged ones are made again."""
    for path in sorted(folder.glob("*.json")):
        result = header.read_if_current(path, kind)
        if result is None or not path.with_suffix(".parquet").exists():
            continue
        try:
            verdicts = read_verdicts(path.with_suffix(".parquet"))
            if isinstance(result, EvaluationResult):
                check_counts(path, result, verdicts)
        except ValueError as error:
            log.warning("%s is not used: %s", path.name, error)
            continue
        return result
    return None


class ProgressBar(EvaluationHooks):
    """Images done, on a terminal, and forward passes, as a chunk may take long.

    If the number of `passes` of a chunk is known, the bar advances with each of them.
    """

    def __init__(self, label: str, images: int, chunk: int, passes: int | None) -> None:
        self._chunk, self._chunks, self._passes_of_chunk = chunk, -(-images // chunk), passes
        self._passes, self._in_chunk, self._images_done, self._drawn_at = 0, 0, 0, monotonic()
        self._bar = tqdm(total=images, desc=label, unit=" images", disable=None)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def chunk_done(self, done: int, total: int) -> None:
        self._images_done = min(self._chunk * (self._chunks - total + done), self._bar.total)
        self._in_chunk = 0
        self._bar.update(self._images_done - self._bar.n)

    def pass_begins(self) -> None:
        self._passes += 1
        self._in_chunk += 1
        if monotonic() - self._drawn_at >= 1:
            self._drawn_at = monotonic()
            self._bar.set_postfix_str(self._passes_text(), refresh=False)
            if self._passes_of_chunk is not None:
                size = min(self._chunk, self._bar.total - self._images_done)
                self._bar.n = self._images_done + size * self._in_chunk // self._passes_of_chunk
            self._bar.refresh()

    def _passes_text(self) -> str:
        if self._passes_of_chunk is None:
            return f"{self._passes:,} passes"
        return f"pass {self._in_chunk} of {self._passes_of_chunk}"
