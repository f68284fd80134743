"""What `launch evaluate` makes of one network: kept counts and honesty checks, or new ones, which are then kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from tqdm import tqdm

from pipeline.distributed import Group
from pipeline.evaluation import runner
from pipeline.evaluation.chunks import ChunkStore, Crops, Images
from pipeline.evaluation.honesty.runner import chunk_store, honesty_task, live_network, look, made_before, say
from pipeline.evaluation.measures.base import Verdicts
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.evaluation.runner import Task
from pipeline.models import Network
from pipeline.models.export import load_model
from pipeline.recipe.schema import Recipe
from pipeline.recipe.stages import stages_of
from pipeline.run.files import exclusive, sha256_of
from pipeline.run.layout import honesty_path

Facts = dict[str, Any]


@dataclass(frozen=True)
class Judge:
    """Networks of one run, on one set of images. Everything is kept in evaluate/ beside the network."""

    run_folder: Path
    recipe: Recipe
    images: Images
    crops: Crops
    group: Group

    def counts(self, path: Path, task: Task, more: Facts) -> Facts:
        """Counts of an evaluation, whoever made it, and `more`, which is kept with those that are made now.

        Errors: ValueError; LoaderError for images that do not come.
        """

        def make(facts: Facts, chunks: Path, bar: _Bar) -> tuple[Facts, Verdicts, ChunkStore]:
            store, network = ChunkStore(chunks, facts), load_model(path).to(self.group.device)
            calls = {"store": store, "on_chunk": bar.on_chunk, "on_pass": bar.on_pass}
            return *runner.judge(network, facts, task, self.images, self.crops, self.group, **calls), store

        return self._kept_or_made(path, task, make, more) | more

    def honesty(self, path: Path, pgd: Pgd, images: int | None) -> Facts:
        """On how many images a network that `pgd` attacks was looked at, and every check with its verdict and figure.

        What warns is logged. Errors: those of `counts`.
        """
        task = honesty_task(self.recipe, pgd, images or self.images.num_samples)
        own = made_before(honesty_path(path.parent), task.facts(self.images, sha256_of(path)))

        def make(facts: Facts, chunks: Path, bar: _Bar) -> tuple[Facts, Verdicts, ChunkStore]:
            live = self._live(path)
            store = chunk_store(chunks, facts, live)
            calls = {"store": store, "on_chunk": bar.on_chunk, "on_pass": bar.on_pass}
            verdicts, found = look(path, live, task, self.images, self.crops, self.group, **calls)
            say(self._stage_name(path), found)
            return facts | {"checks": [asdict(check) for check in found]}, verdicts, store

        made = own or self._kept_or_made(path, task, make, {})
        checks = [{key: check[key] for key in ("name", "verdict", "figure")} for check in made["checks"]]
        return {"images": made["images"], "checks": checks}

    def _live(self, path: Path) -> Network | None:
        """The network that a file was written from, where that is a finished stage's."""
        name = self._stage_name(path)
        stage = next((stage for stage in stages_of(self.recipe) if stage.name == name), None)
        if stage is None or not (path.parent / "result.json").exists():
            return None
        return live_network(self.recipe, path.parent, stage)

    def _stage_name(self, path: Path) -> str:
        return path.parent.resolve().relative_to(self.run_folder.resolve()).as_posix()

    def _kept_or_made(self, path: Path, task: Task, make: Callable[..., Any], more: Facts) -> Facts:
        facts = task.facts(self.images, sha256_of(path))
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path.parent} cannot be written, and verdicts are kept there; make a copy of the run")
        folder = path.parent / "evaluate"
        folder.mkdir(exist_ok=True)
        # Not a name that the run itself would give.
        label = f"{task.label}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]}"
        with exclusive(folder / f".{label}.lock"):
            if (kept := _kept(folder, facts)) is not None:
                return kept
            with _Bar(f"{path.parent.name}: {task.label}", facts["images"], task.chunk, task.passes) as bar:
                made, verdicts, store = make(facts, folder / f"{label}.chunks", bar)
            runner.keep(folder, label, made | more, verdicts)
            store.remove()
        return made


def _kept(folder: Path, facts: Facts) -> Facts | None:
    """What was found before by an evaluation that `facts` describe."""
    for path in sorted(folder.glob("*.json")):
        found = made_before(path, facts)
        if found is not None and path.with_suffix(".parquet").exists():
            return found
    return None


class _Bar:
    """Images judged, on a terminal; and passes through the network, as a chunk may take long.

    Where it is known how many `passes` a chunk takes, the bar moves with them.
    """

    def __init__(self, label: str, images: int, chunk: int, passes: int | None) -> None:
        self._chunk, self._chunks, self._passes_of_chunk = chunk, -(-images // chunk), passes
        self._passes, self._in_chunk, self._judged, self._drawn_at = 0, 0, 0, monotonic()
        self._bar = tqdm(total=images, desc=label, unit=" images", disable=None)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def on_chunk(self, done: int, left: int) -> bool:
        """`done` of the `left` chunks that were not kept."""
        self._judged = min(self._chunk * (self._chunks - left + done), self._bar.total)
        self._in_chunk = 0
        self._bar.update(self._judged - self._bar.n)
        return False

    def on_pass(self) -> bool:
        self._passes += 1
        self._in_chunk += 1
        if monotonic() - self._drawn_at >= 1:
            self._drawn_at = monotonic()
            self._bar.set_postfix_str(self.passed, refresh=False)
            if self._passes_of_chunk is not None:
                size = min(self._chunk, self._bar.total - self._judged)
                self._bar.n = self._judged + size * self._in_chunk // self._passes_of_chunk
            self._bar.refresh()
        return False

    @property
    def passed(self) -> str:
        if self._passes_of_chunk is None:
            return f"{self._passes:,} passes"
        return f"pass {self._in_chunk} of {self._passes_of_chunk}"
