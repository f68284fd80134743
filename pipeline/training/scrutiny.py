"""Honesty checks inside a run: once per network that an attack judges, on a few test images, before its evaluation."""

from __future__ import annotations

from dataclasses import asdict

from pipeline.evaluation.honesty.runner import chunk_store, honesty_task, live_network, look, made_before, say
from pipeline.evaluation.measures.pgd import Pgd
from pipeline.evaluation.runner import measure_of
from pipeline.recipe.stages import Stage
from pipeline.run.files import atomic_write_json, sha256_of
from pipeline.run.layout import honesty_path
from pipeline.run.lease import check_token
from pipeline.training.context import Job


def scrutinise(job: Job, stage: Stage) -> None:
    """Write honesty.json of a finished stage, and log what warns. Collective.

    Only what PGD judges is looked at; a certificate and a proof need no attack. Finished chunks are kept over a stop or
    a crash, and a file that is there is left as it is. Errors: those of `evaluate`; StopRequested.
    """
    recipe, folder = job.recipe, job.folder(stage)
    pgd = measure_of(recipe)
    if not isinstance(pgd, Pgd) or pgd.threat_model is None or not recipe.evaluation.honesty_images:
        return
    model, loader = folder / "model.safetensors", job.loader(recipe.data.test_file)
    task = honesty_task(recipe, pgd, recipe.evaluation.images or loader.num_samples)
    facts = task.facts(loader, sha256_of(model))
    target = honesty_path(folder)
    if job.group.broadcast(job.group.is_first and made_before(target, facts) is not None):
        return
    live = live_network(recipe, folder, stage)
    store = chunk_store(folder / "evaluate" / "honesty.chunks", facts, live)

    def on_chunk(done: int, total: int) -> bool:
        job.observe("chunk", {"stage": stage.name, "done": done})
        return job.stop_requested()

    def on_pass() -> bool:
        job.observe("pass", {"stage": stage.name})
        return job.stop_requested()

    crops = job.evaluation_crops(loader)
    _, found = look(model, live, task, loader, crops, job.group, store=store, on_chunk=on_chunk, on_pass=on_pass)
    if job.group.is_first:
        check_token(folder, job.token)
        atomic_write_json(target, facts | {"checks": [asdict(check) for check in found]})
        store.remove()
        say(stage.name, found)
    job.group.barrier()
