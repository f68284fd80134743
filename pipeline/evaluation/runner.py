"""Evaluates one network: one verdict per image, independent of the number of workers and of interruptions.

Images are evaluated in fixed chunks of file order, distributed to the workers. With a store, each finished chunk is a
file, and an interrupted evaluation resumes with the next one. A chunk may take hours, so a worker that is done polls
for the others' files instead of waiting in a collective, whose timeout is meant for hung workers.
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
    """Callbacks of a running evaluation; a caller overrides those it needs."""

    def chunk_done(self, done: int, total: int) -> None:
        """`done` of this rank's `total` chunks are done; chunks already in the store do not count."""

    def pass_begins(self) -> None:
        """Called before each forward pass, and repeatedly while this rank waits for others."""

    def stop_requested(self) -> bool:
        """Polled after each chunk and before each forward pass; True abandons the current chunk at once."""
        return False

    def before_writing(self) -> None:
        """Called on rank 0 before results are written; raising prevents the write."""


class _ChunkAbandoned(Exception):
    """The current chunk is not finished."""


@dataclass(frozen=True)
class Evaluator:
    """Evaluates networks on one set of images. All methods are collective."""

    images: EvaluationImages
    group: Group
    hooks: EvaluationHooks = field(default_factory=EvaluationHooks)

    def evaluate(
        self, spec: EvaluationSpec, file: Path, name: str, honesty: HonestySummary | None = None
    ) -> EvaluationResult:
        """Evaluate the network in `file` by `spec`; every rank returns the result.

        Rank 0 writes verdicts and result to `evaluate/<name>` next to the file; until then, finished chunks are in
        `evaluate/<name>.chunks/`. Errors: those of `verdicts` and of `load_model`.
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
        """Verdicts for all images, sorted by sample id, on every rank; chunks already in `store` are not repeated.

        The network is put in eval mode and restored; its parameters are not touched.
        Errors: StopRequested on every rank if any rank's hooks request a stop; ValueError without images; those of the
        loader.
        """
        chunks = self.images.chunks(chunk)
        stored = self.group.broadcast(store.open() if store is not None and self.group.is_first else {})
        remaining = [index for index in range(len(chunks)) if index not in stored]
        mine = remaining[self.group.rank :: self.group.world]
        parts: list[Verdicts] = []
        with crafting(network), _before_each_pass(network, self._check_stop), suppress(_ChunkAbandoned):
            for index, batch in zip(mine, self.images.batches(chunks[index] for index in mine), strict=False):
                parts.append(self._verdicts_of(network, batch, measure))
                if store is not None:
                    store.put(index, parts[-1])
                self.hooks.chunk_done(len(parts), len(mine))
                if self.hooks.stop_requested():
                    break
        is_stopped = len(parts) < len(mine)
        if store is not None and self.group.world > 1:
            if is_stopped:
                store.stop()
            store.wait(len(chunks), self._poll_stop)
        gathered_parts = self.group.gather((parts, is_stopped))
        if any(rank_stopped for _, rank_stopped in gathered_parts):
            raise StopRequested("asked to stop during an evaluation; a resume continues with the next chunk")
        gathered = [*stored.values(), *(part for rank_parts, _ in gathered_parts for part in rank_parts)]
        if not gathered:
            raise ValueError("there is no image to evaluate")
        verdicts = _sorted(gathered)
        if not np.array_equal(verdicts["sample_id"], np.sort(self.images.ids)):
            raise RuntimeError("an evaluation does not cover every image exactly once")
        return verdicts

    def _poll_stop(self) -> bool:
        """Report a forward pass or a wait, and return whether to stop."""
        self.hooks.pass_begins()
        return self.hooks.stop_requested()

    def _check_stop(self, *_: object) -> None:
        if self._poll_stop():
            raise _ChunkAbandoned

    def _verdicts_of(self, network: nn.Module, batch: Batch, measure: Measure) -> Verdicts:
        ids = batch.ids.numpy()
        columns = measure.verdicts(network, *batch.to(self.group.device), ids)
        return {"sample_id": ids, "label": batch.labels.numpy(), **{n: c.cpu().numpy() for n, c in columns.items()}}


def write_evaluation(folder: Path, name: str, result: EvaluationResult, verdicts: Verdicts) -> None:
    """Write the verdicts, then the result file, which commits the evaluation."""
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
