"""The task on every node of a SLURM job: the first node leads, the others follow.

The leader starts a Ray head and the driver; the others join. Each task only watches processes: if any ends too early
(driver, head, a node's raylet), this generation of the cluster ends on all nodes, and the next one resumes from the
newest checkpoint. submitit announces the time limit and preemption (SIGUSR2): the leader has the workers write a
checkpoint, and the job is requeued. If a task itself is killed or a node is lost, the batch script or SLURM requeues
the job. Imports neither torch nor Ray, which are for the child processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.ray_cluster.environment import OBJECT_STORE_BYTES, ray_environment, write_token
from launch.ray_cluster.reaper import CLUSTER_MARK, Reaper, ignore_job_signals
from launch.ray_cluster.scratch import python_for_ray
from launch.slurm.control_files import ALIVE_EVERY_S, ControlFiles, JobFailed, count_start, start_of_job
from launch.slurm.nodes import node_advice
from pipeline.recipe.schema import Recipe
from pipeline.recipe.slurm import Slurm
from pipeline.run.files import touch
from pipeline.run.layout import progress_marks
from pipeline.run.provenance import load_run_recipe

POLL_S = 0.5
STOPPED = 75
"""Exit code of a driver that stopped on request (EX_TEMPFAIL)."""
LEAVE_S = 20.0
"""How long the leader waits for the other nodes to leave at the end."""


@dataclass
class JobPayload:
    """The submitted object: one job's part of a run. Plain values only, as submitit pickles it."""

    run_folder: str
    job_name: str
    stages: list[str]
    observer: str | None = None
    _task: _Task | None = field(default=None, repr=False)

    def __call__(self) -> None:
        self._task = _Task(self)
        self._task.run()

    def checkpoint(self) -> Any:
        """submitit calls this in the leader's main thread when the job is about to end, and then requeues it."""
        import submitit

        if self._task is not None:
            self._task.stop_driver()
        return submitit.helpers.DelayedSubmission(
            JobPayload(self.run_folder, self.job_name, self.stages, self.observer)
        )


class _Task:
    """The task of one node."""

    def __init__(self, payload: JobPayload) -> None:
        import submitit

        self.payload = payload
        self.run_folder = Path(payload.run_folder)
        self.node = int(os.environ["SLURM_PROCID"])
        self.control = ControlFiles.of(self.run_folder, *start_of_job())
        self.recipe: Recipe = load_run_recipe(self.run_folder)
        assert self.recipe.slurm is not None
        self.slurm: Slurm = self.recipe.slurm
        self.hosts = list(submitit.JobEnvironment().hostnames)
        """Host names of all nodes, in the order of their numbers."""
        self.host = self.hosts[self.node]
        self._driver: subprocess.Popen[bytes] | None = None
        self._parent = os.getppid()
        self._beat_at = float("-inf")

    def log(self, text: str) -> None:
        print(f"[{self.host}] {text}", file=sys.stderr, flush=True)

    def run(self) -> None:
        self.control.create()  # on every node: the leader may be the last to start
        if self.node == 0:
            self._lead()
        else:
            self._follow()

    # --- every node ---------------------------------------------------------------------------------------------------

    def _wait(self, condition: Callable[[], bool], deadline_s: float) -> bool:
        """Poll until the condition holds; False if the deadline passes first. Sends heartbeats meanwhile."""
        end, pause = time.monotonic() + deadline_s, threading.Event()
        while not condition():
            if time.monotonic() - self._beat_at > ALIVE_EVERY_S:
                self._beat_at = time.monotonic()
                self._beat()
            if time.monotonic() > end:
                return False
            if os.getppid() != self._parent:  # slurmstepd was killed: SLURM has lost this task
                os.kill(os.getpid(), signal.SIGKILL)  # its reaper ends the rest
            pause.wait(POLL_S)
        return True

    def _beat(self) -> None:
        """Write a heartbeat; end if the job has restarted elsewhere, as when only this node's slurmd has died."""
        try:
            self.control.beat(self.node)
        except OSError as error:  # if this persists, the other nodes notice
            self.log(f"cannot write a heartbeat: {error}")
        if self.control.was_replaced():
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_silent(self, node: int) -> bool:
        """Whether a node is lost or hung; the deadline is that of workers."""
        return self.control.is_silent(node, self.recipe.workers.hang_timeout_s)

    def _silence_message(self, nodes: list[int]) -> str:
        hosts = [self.hosts[node] for node in nodes]
        deadline = f"{self.recipe.workers.hang_timeout_s:g} s"
        return f"no heartbeat from {', '.join(hosts)} for {deadline}; {node_advice(hosts, self.slurm)}"

    def _start_child(self, reaper: Reaper, *command: str) -> subprocess.Popen[bytes]:
        """Start a child with the reaper's mark, which ignores the signals that SLURM sends to the job."""
        gpu = self.recipe.workers.device != "cpu" and self.slurm.asks_for_gpus
        environment = {
            **os.environ,
            **ray_environment(self.control.token, reaper.folder, gpu),
            CLUSTER_MARK: reaper.mark,
        }
        python = python_for_ray(reaper.folder)
        return subprocess.Popen([python, *command], env=environment, preexec_fn=ignore_job_signals)

    def _start_ray(self, reaper: Reaper, *where: str) -> subprocess.Popen[bytes]:
        workers = self.slurm.workers_of_a_node(self.recipe.workers.threads)
        gpus = workers if self.slurm.asks_for_gpus else 0
        return self._start_child(
            reaper,
            *("-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *where),
            # No autoscaling; workers log to the run directory.
            *("--no-monitor", "--include-log-monitor", "false"),
            *("--temp-dir", str(reaper.ray_folder), "--object-store-memory", str(OBJECT_STORE_BYTES)),
            *("--num-cpus", str(workers * self.recipe.workers.threads), "--num-gpus", str(gpus)),
            *("--resources", f'{{"node_{self.node}": 1}}'),
        )

    # --- the first node -----------------------------------------------------------------------------------------------

    def _lead(self) -> None:
        signal.signal(signal.SIGTERM, self._on_terminate)
        limit = self.recipe.workers.restarts_without_progress
        count_start(self.run_folder, self.payload.job_name, len(self.hosts), self._marks(), limit)
        if not self.control.token.exists():
            write_token(self.control.token)
        generation, failures, marks = 0, 0, self._marks()
        while True:
            code, reason = self._lead_generation(generation)
            if code is not None:
                break
            previous, marks = marks, self._marks()
            failures = 0 if marks != previous else failures + 1
            if failures > limit:
                reason = f"failed {failures} times in a row without a new checkpoint; last: {reason}"
                code, reason = 1, f"{reason}; see {self.run_folder}/logs/"
                break
            self.log(f"{reason}; restarting from the newest checkpoint")
            generation += 1
        if code == STOPPED:
            # Not through submitit's handler, which does not return here: SLURM is ending the job. Exit code 0 would
            # count as done.
            raise JobFailed("stopped with a checkpoint before the end of the run")
        self.control.end(code, reason)
        self._wait(lambda: len(list(self.control.folder.glob("left-*"))) >= len(self.hosts) - 1, LEAVE_S)
        if code:
            raise JobFailed(reason)

    def _lead_generation(self, generation: int) -> tuple[int | None, str]:
        """One Ray cluster from start to end. Returns (exit code, or None for another generation; the reason)."""
        reaper = Reaper()
        try:
            head = self._start_ray(reaper, "--head", "--port", "0", "--include-dashboard", "false")
            address = reaper.ray_folder / "ray_current_cluster"
            up = self._wait(lambda: address.exists() or head.poll() is not None, self.slurm.node_start_s)
            if not up or head.poll() is not None:
                return None, f"the Ray head on {self.host} did not start within {self.slurm.node_start_s} s"
            self.control.publish(generation, address.read_text().strip())
            driver = self._start_child(
                reaper,
                *("-m", "launch.slurm.driver_main", self.payload.run_folder),
                *("--stages", ",".join(self.payload.stages), "--hosts", ",".join(self.hosts)),
                *("--control", str(self.control.folder), "--generation", str(generation)),
                *(("--observer", self.payload.observer) if self.payload.observer else ()),
            )
            self._driver = driver

            def over() -> bool:
                has_ended = driver.poll() is not None or head.poll() is not None
                return has_ended or bool(self.control.lost_nodes(generation) or self._silent_nodes())

            self._wait(over, float("inf"))
            if (code := driver.poll()) in (0, STOPPED):
                return code, ""
            if (end := self.control.ended()) is not None:
                return end["code"], end["message"]
            if code is not None:
                return None, self.control.failure(generation) or f"the driver ended with {code}"
            if head.poll() is not None:
                return None, f"the Ray head on {self.host} ended"
            if lost := self.control.lost_nodes(generation):
                return None, f"Ray ended on {', '.join(self.hosts[node] for node in lost)}"
            message = self._silence_message(self._silent_nodes())
            self.control.record_failure(generation, message)  # for the message of the start that gives up
            raise JobFailed(message)
        finally:
            reaper.close()

    def _silent_nodes(self) -> list[int]:
        return [node for node in range(1, len(self.hosts)) if self._is_silent(node)]

    def _marks(self) -> list[int]:
        return progress_marks(self.run_folder, self.payload.stages)

    def stop_driver(self) -> None:
        """Have the workers write a checkpoint, and wait for it within the time that SLURM gives."""
        touch(self.control.stop)
        if (driver := self._driver) is None:
            return
        self.log("stop requested: the workers write a checkpoint at the next step")
        done = self._wait(lambda: driver.poll() is not None, self.slurm.signal_s * 0.8)
        self.log("stopped with a checkpoint" if done else "no checkpoint in time: the job resumes from an older one")

    def _on_terminate(self, number: int, frame: object) -> None:
        """Preemption without a warning, or scancel: use the time that is left."""
        touch(self.control.stop)

    # --- the other nodes ----------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        generation = 0
        while True:

            def is_announced(current: int = generation) -> bool:
                return self.control.address(current) is not None or self.control.ended() is not None

            if not self._wait(is_announced, self.slurm.node_start_s + LEAVE_S):
                self._fail_without_leader()
            if self.control.ended() is not None:
                break
            self._follow_generation(generation)
            generation += 1
        touch(self.control.folder / f"left-{self.node}")

    def _fail_without_leader(self) -> None:
        first, deadline = self.hosts[0], self.slurm.node_start_s
        message = f"{first}, the first node, did not start Ray in {deadline} s; {node_advice([first], self.slurm)}"
        if not self.control.was_counted():  # the job is not requeued, and the leader records no reason
            self.control.end(1, message)
        raise JobFailed(message)

    def _follow_generation(self, generation: int) -> None:
        """Join one Ray cluster, until the next one is up or the job is over."""
        reaper = Reaper()
        try:
            address = self.control.address(generation)
            assert address is not None
            ray = self._start_ray(reaper, "--address", address)

            def over() -> bool:
                if self._is_silent(0):
                    raise JobFailed(self._silence_message([0]))
                return self.control.address(generation + 1) is not None or self.control.ended() is not None

            self._wait(lambda: over() or ray.poll() is not None, float("inf"))
            if not over():
                self.log("Ray ended on this node")
                self.control.mark_lost(generation, self.node)
        finally:
            reaper.close()
