"""Runs a function in several processes that form a gloo process group, without Ray, and returns their results.

They are forked from one server process per session that has imported everything (`warm`); the server ends with the last
process that can use it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, SpawnContext
from queue import Empty
from typing import Any

DEADLINE_S = 480
WARM = "tests.support.warm"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def warm_context() -> ForkServerContext:
    """Its processes are forked from the session's server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([WARM])
    return context


def _run_worker(
    environment: dict[str, str],
    rank: int,
    world: int,
    port: int,
    threads: int,
    function: Callable[..., Any],
    arguments: tuple,
    out: Any,
) -> None:
    os.environ.clear()
    os.environ.update(
        environment,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        NODE_RANK="0",
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS=str(threads),
    )
    try:
        import torch

        from pipeline.distributed import Group, make_deterministic
        from pipeline.training.engine import prepare_deepspeed

        prepare_deepspeed(torch.device("cpu"))
        make_deterministic(threads)
        result = function(Group(rank, world, torch.device("cpu")), *arguments)
        out.put((rank, True, pickle.dumps(result)))  # as bytes: tensors would travel as open file descriptors
        torch.distributed.destroy_process_group()
    except BaseException:
        out.put((rank, False, traceback.format_exc()))
        raise


def run_group(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    threads: int = 1,
    deadline_s: float = DEADLINE_S,
    fresh: bool = False,
) -> list[Any]:
    """`function(group, *arguments)` in `world` processes; returns their results in rank order, which must be picklable.

    `fresh` starts new interpreters, for settings that must precede an interpreter's start, such as LD_PRELOAD.
    """
    context: SpawnContext | ForkServerContext = multiprocessing.get_context("spawn") if fresh else warm_context()
    out = context.Queue()
    port = _free_port()
    workers = [
        context.Process(
            target=_run_worker, args=(dict(os.environ), rank, world, port, threads, function, arguments, out)
        )
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    try:
        results: dict[int, Any] = {}
        end = time.monotonic() + deadline_s
        while len(results) < world:
            try:
                rank, succeeded, result = out.get(timeout=1)
            except Empty:
                killed = [
                    f"rank {rank} by signal {-(worker.exitcode or 0)}"
                    for rank, worker in enumerate(workers)
                    if rank not in results and (worker.exitcode or 0) < 0
                ]
                assert not killed, f"ended: {killed}"
                assert time.monotonic() < end, f"{world - len(results)} of {world} processes returned no result"
                continue
            assert succeeded, f"rank {rank}:\n{result}"
            results[rank] = pickle.loads(result)
        for worker in workers:
            worker.join(timeout=30)
        return [results[rank] for rank in range(world)]
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()
