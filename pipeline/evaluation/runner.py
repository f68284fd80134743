"""Evaluates one network: one verdict per image, whatever the number of workers and however often it is interrupted.

Images go through in fixed chunks of file order, dealt to the workers there are. With a store, a finished chunk is a
file, and an evaluation that was stopped or killed resumes with the next one. A chunk may then take hours: a worker that
is done waits for the others' files instead of in a collective, whose deadline is for workers that hang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import nn

from pipeline.data.loading.loader import Batch
from pipeline.distributed import Group
from pipeline.evaluation.chunks import ChunkStore, write_verdicts
from pipeline.evaluation.images import EvaluationImages
from pipeline.evaluation.measures.base import Measure, Verdicts, summarise
from pipeline.evaluation.result import EvaluationResult, HonestySummary
from pipeline.evaluation.spec import EvaluationSpec
from pipeline.models.export import load_model
from pipeline.robustness.attacks import crafting
from pipeline.run.files import atomic_write_json
from pipeline.run.layout import StageFolder
from pipeline.run.stop import StopRequested


class EvaluationHooks:
    """What an evaluation reports and asks while it runs; a caller overrides what it needs."""

    def chunk_done(self, done: int, total: int) -> None:
        """`done` of this rank's `total` chunks are done; those that were in the store are not counted."""

    def pass_begins(self) -> None:
        """Before each forward pass of the network, and again and again while this rank waits for others."""

    def stop_requested(self) -> bool:
        """Asked after each chunk and before each pass: if true, the chunk under way is given up at once."""
        return False

    def before_writing(self) -> None:
        """On rank 0, before results are written; an error keeps them from it."""


class _ChunkGivenUp(Exception):
    """The chunk under way is not finished."""


@dataclass(frozen=True)
class Evaluator:
    """Evaluates networks on one set of images. All methods are collective."""

    images: EvaluationImages
    group: Group
    hooks: EvaluationHooks = field(default_factory=EvaluationHooks)

    def evaluate(
        self, spec: EvaluationSpec, file: Path, name: str, honesty: HonestySummary | None = None
    ) -> EvaluationResult:
        """Evaluate the network in `file` as `spec` says; the result, on every rank.

        Rank 0 keeps verdicts and result as `evaluate/<name>` beside the file, and finished chunks in
        `evaluate/<name>.chunks/` until then. Errors: those of `verdicts` and of `load_model`.
        """
        header, folder = spec.header(self.images, file), StageFolder(file.parent).evaluations
        store = ChunkStore(folder / f"{name}.chunks", header.to_json())
        part = replace(self, images=self.images.spread(spec.images))
        verdicts = part.verdicts(load_model(file).to(self.group.device), spec.measure, spec.chunk, store)
        values = header.to_json() | summarise(verdicts)
        result = EvaluationResult.parse(values).model_copy(update={"honesty": honesty})
        if self.group.is_first:
            self.hooks.before_writing()
            write_evaluation(folder, name, result, verdicts)
            store.remove()
        self.group.barrier()
        return result

    def verdicts(self, network: nn.Module, measure: Measure, chunk: int, store: ChunkStore | None = None) -> Verdicts:
        """Verdicts for all images, sorted by sample id, on every rank; chunks that `store` has are not repeated.

        The network is put in eval mode and restored; its parameters are not touched.
        Errors: StopRequested on every rank if the hooks of any asked to stop; ValueError without images; those of the
        loader.
        """
        chunks = self.images.chunks(chunk)
        kept = self.group.broadcast(store.open() if store is not None and self.group.is_first else {})
        left = [index for index in range(len(chunks)) if index not in kept]
        mine = left[self.group.rank :: self.group.world]
        parts: list[Verdicts] = []
        with crafting(network), _before_each_pass(network, self._check_stop), suppress(_ChunkGivenUp):
            for index, batch in zip(mine, self.images.batches(chunks[index] for index in mine), strict=False):
                parts.append(self._verdicts_of(network, batch, measure))
                if store is not None:
                    store.put(index, parts[-1])
                self.hooks.chunk_done(len(parts), len(mine))
                if self.hooks.stop_requested():
                    break
        stopped = len(parts) < len(mine)
        if store is not None and self.group.world > 1:
            if stopped:
                store.stop()
            store.wait(len(chunks), self._pass)
        answers = self.group.gather((parts, stopped))
        if any(stopped for _, stopped in answers):
            raise StopRequested("asked to stop during an evaluation; a resume continues with the next chunk")
        gathered = [*kept.values(), *(part for rank_parts, _ in answers for part in rank_parts)]
        if not gathered:
            raise ValueError("there is no image to evaluate")
        verdicts = _sorted(gathered)
        if not np.array_equal(verdicts["sample_id"], np.sort(self.images.ids)):
            raise RuntimeError("an evaluation did not have every image exactly once")
        return verdicts

    def _pass(self) -> bool:
        """Report a pass; whether to stop."""
        self.hooks.pass_begins()
        return self.hooks.stop_requested()

    def _check_stop(self, *_: object) -> None:
        if self._pass():
            raise _ChunkGivenUp

    def _verdicts_of(self, network: nn.Module, batch: Batch, measure: Measure) -> Verdicts:
        ids = batch.ids.numpy()
        columns = measure.verdicts(network, *batch.to(self.group.device), ids)
        return {"sample_id": ids, "label": batch.labels.numpy(), **{n: c.cpu().numpy() for n, c in columns.items()}}


def write_evaluation(folder: Path, name: str, result: EvaluationResult, verdicts: Verdicts) -> None:
    """Write the verdicts, and then the result, whose file commits the evaluation."""
    write_verdicts(folder / f"{name}.parquet", verdicts)
    atomic_write_json(folder / f"{name}.json", result.to_json())


@contextmanager
def _before_each_pass(network: nn.Module, call: Callable[..., None]) -> Iterator[None]:
    hook = network.register_forward_pre_hook(call)
    try:
        yield
    finally:
        hook.remove()


def _sorted(parts: list[Verdicts]) -> Verdicts:
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(joined["sample_id"], kind="stable")
    return {name: column[order] for name, column in joined.items()}
