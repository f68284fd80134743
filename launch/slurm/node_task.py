"""What runs on every node of a SLURM job, one task each: the first node leads, the others follow.

The leader starts a Ray head and the driver; the others join. Each task only watches processes: whatever ends too early
(driver, head, a node's raylet) ends this generation of the cluster on all nodes, and the next one goes on from the
newest checkpoint. The time limit and preemption are submitit's to announce (SIGUSR2): the leader has the workers write
a checkpoint, and the job queues again. A task that itself is killed, or a node that is lost, is the batch script's and
SLURM's to requeue. No torch and no Ray here: the heavy imports are the children's.
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
from launch.slurm.control_files import ALIVE_EVERY_S, ControlFiles, JobFailed, begin, start_of_job
from launch.slurm.nodes import look_at
from pipeline.recipe.file import load_recipe
from pipeline.recipe.schema import Recipe
from pipeline.recipe.slurm import Slurm
from pipeline.run.layout import RunFolder, progress_marks

POLL_S = 0.5
STOPPED = 75
"""The driver's exit code once it has stopped as asked (EX_TEMPFAIL)."""
LEAVE_S = 20.0
"""How long the leader waits for the others when a start is over."""


@dataclass
class JobPayload:
    """The submitted object: a job's part of a run. Plain values only, as submitit pickles it."""

    run_folder: str
    job_name: str
    stages: list[str]
    observer: str | None = None
    _task: _Task | None = field(default=None, repr=False)

    def __call__(self) -> None:
        self._task = _Task(self)
        self._task.run()

    def checkpoint(self) -> Any:
        """submitit calls this in the leader's main thread when the job is about to be ended; then it queues again."""
        import submitit

        if self._task is not None:
            self._task.stop_driver()
        return submitit.helpers.DelayedSubmission(
            JobPayload(self.run_folder, self.job_name, self.stages, self.observer)
        )


class _Task:
    """One node's part, from the start of its task to the end."""

    def __init__(self, payload: JobPayload) -> None:
        import submitit

        self.payload = payload
        self.run_folder = Path(payload.run_folder)
        self.node = int(os.environ["SLURM_PROCID"])
        self.control = ControlFiles.of(self.run_folder, *start_of_job())
        self.recipe: Recipe = load_recipe(RunFolder(self.run_folder).recipe)
        assert self.recipe.slurm is not None
        self.slurm: Slurm = self.recipe.slurm
        self.hosts = list(submitit.JobEnvironment().hostnames)
        """Of all nodes, in the order of their numbers."""
        self.host = self.hosts[self.node]
        self._driver: subprocess.Popen[bytes] | None = None
        self._parent = os.getppid()
        self._beat_at = float("-inf")

    def say(self, text: str) -> None:
        print(f"[{self.host}] {text}", file=sys.stderr, flush=True)

    def run(self) -> None:
        self.control.create()  # each for itself: the first node may be the last to come
        if self.node == 0:
            self._lead()
        else:
            self._follow()

    # --- both ---------------------------------------------------------------------------------------------------------

    def _wait(self, condition: Callable[[], bool], deadline_s: float) -> bool:
        """Poll until the condition holds; False when the deadline came first. Keeps the heartbeat going."""
        end, pause = time.monotonic() + deadline_s, threading.Event()
        while not condition():
            if time.monotonic() - self._beat_at > ALIVE_EVERY_S:
                self._beat_at = time.monotonic()
                self._beat()
            if time.monotonic() > end:
                return False
            if os.getppid() != self._parent:  # slurmstepd was killed, and with it what SLURM knows of this task
                os.kill(os.getpid(), signal.SIGKILL)  # its guard ends the rest
            pause.wait(POLL_S)
        return True

    def _beat(self) -> None:
        """Say that this node lives, and end if others have its job, as when only its slurmd has died."""
        try:
            self.control.beat(self.node)
        except OSError as error:  # others notice if it stays
            self.say(f"cannot say that this node lives: {error}")
        if self.control.was_replaced():
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_silent(self, node: int) -> bool:
        """Lost with its node, or hung: the deadline is that of workers."""
        return self.control.silent(node, self.recipe.workers.hang_timeout_s)

    def _not_heard_of(self, nodes: list[int]) -> str:
        hosts = [self.hosts[node] for node in nodes]
        waited = f"{self.recipe.workers.hang_timeout_s:g} s"
        return f"nothing was heard of {', '.join(hosts)} for {waited}; {look_at(hosts, self.slurm)}"

    def _start(self, guard: Reaper, *command: str) -> subprocess.Popen[bytes]:
        """A child that carries the guard's mark, and is deaf to what SLURM sends to the job."""
        gpu = self.recipe.workers.device != "cpu"
        environment = {**os.environ, **ray_environment(self.control.token, guard.folder, gpu), CLUSTER_MARK: guard.mark}
        return subprocess.Popen([sys.executable, *command], env=environment, preexec_fn=ignore_job_signals)

    def _start_ray(self, guard: Reaper, *where: str) -> subprocess.Popen[bytes]:
        workers = self.slurm.workers_of_a_node(self.recipe.workers.threads)
        gpus = workers if self.slurm.gpus_per_node or self.slurm.gres else 0
        return self._start(
            guard,
            *("-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *where),
            # Nobody scales this cluster, and workers log to the run directory.
            *("--no-monitor", "--include-log-monitor", "false"),
            *("--temp-dir", str(guard.ray_folder), "--object-store-memory", str(OBJECT_STORE_BYTES)),
            *("--num-cpus", str(workers * self.recipe.workers.threads), "--num-gpus", str(gpus)),
            *("--resources", f'{{"node_{self.node}": 1}}'),
        )

    # --- the first node -----------------------------------------------------------------------------------------------

    def _lead(self) -> None:
        signal.signal(signal.SIGTERM, self._terminated)
        limit = self.recipe.workers.restarts_without_progress
        begin(self.run_folder, self.payload.job_name, len(self.hosts), self._marks(), limit)
        if not self.control.token.exists():
            write_token(self.control.token)
        generation, failures, marks = 0, 0, self._marks()
        while True:
            code, why = self._lead_generation(generation)
            if code is not None:
                break
            now = self._marks()
            failures = 0 if now != marks else failures + 1
            marks = now
            if failures > limit:
                why = f"failed {failures} times in a row without a new checkpoint; last: {why}"
                code, why = 1, f"{why}; see {self.run_folder}/logs/"
                break
            self.say(f"{why}; starting again from the newest checkpoint")
            generation += 1
        if code == STOPPED:
            # Not by submitit's handler, which does not return here: SLURM took the job away, or is about to. It must
            # not end as if all were done.
            raise JobFailed("stopped with a checkpoint before the end of the run")
        self.control.end(code, why)
        self._wait(lambda: len(list(self.control.folder.glob("left-*"))) >= len(self.hosts) - 1, LEAVE_S)
        if code:
            raise JobFailed(why)

    def _lead_generation(self, generation: int) -> tuple[int | None, str]:
        """One Ray cluster from start to end. Returns (the driver's final exit code or None to go on, what happened)."""
        guard = Reaper()
        try:
            head = self._start_ray(guard, "--head", "--port", "0", "--include-dashboard", "false")
            address = guard.ray_folder / "ray_current_cluster"
            up = self._wait(lambda: address.exists() or head.poll() is not None, self.slurm.node_start_s)
            if not up or head.poll() is not None:
                return None, f"the Ray head on {self.host} did not start within {self.slurm.node_start_s} s"
            self.control.publish(generation, address.read_text().strip())
            driver = self._start(
                guard,
                *("-m", "launch.slurm.driver_main", self.payload.run_folder),
                *("--stages", ",".join(self.payload.stages), "--hosts", ",".join(self.hosts)),
                *("--control", str(self.control.folder), "--generation", str(generation)),
                *(("--observer", self.payload.observer) if self.payload.observer else ()),
            )
            self._driver = driver

            def over() -> bool:
                gone = driver.poll() is not None or head.poll() is not None
                return gone or bool(self.control.lost(generation) or self._silent())

            self._wait(over, float("inf"))
            if (code := driver.poll()) in (0, STOPPED):
                return code, ""
            if (ended := self.control.ended()) is not None:
                return ended["code"], ended["message"]
            if code is not None:
                return None, self.control.failure(generation) or f"the driver ended with {code}"
            if head.poll() is not None:
                return None, f"the Ray head on {self.host} ended"
            if lost := self.control.lost(generation):
                return None, f"Ray ended on {', '.join(self.hosts[node] for node in lost)}"
            why = self._not_heard_of(self._silent())
            self.control.fail(generation, why)  # for the last of several starts that end like this
            raise JobFailed(why)
        finally:
            guard.close()

    def _silent(self) -> list[int]:
        return [node for node in range(1, len(self.hosts)) if self._is_silent(node)]

    def _marks(self) -> list[int]:
        return progress_marks(self.run_folder, self.payload.stages)

    def stop_driver(self) -> None:
        """Have the workers write a checkpoint, and wait for it, but not beyond the time that SLURM gives."""
        self.control.stop.touch()
        if (driver := self._driver) is None:
            return
        self.say("asked to stop: the workers write a checkpoint at the next step")
        done = self._wait(lambda: driver.poll() is not None, self.slurm.signal_s * 0.8)
        self.say("stopped with a checkpoint" if done else "no checkpoint in time: the job goes on from the one before")

    def _terminated(self, number: int, frame: object) -> None:
        """Preemption without a warning, or scancel: use what time there is."""
        self.control.stop.touch()

    # --- the others ---------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        generation = 0
        while True:

            def known(current: int = generation) -> bool:
                return self.control.address(current) is not None or self.control.ended() is not None

            if not self._wait(known, self.slurm.node_start_s + LEAVE_S):
                self._miss_first_node()
            if self.control.ended() is not None:
                break
            self._follow_generation(generation)
            generation += 1
        (self.control.folder / f"left-{self.node}").touch()

    def _miss_first_node(self) -> None:
        first, waited = self.hosts[0], self.slurm.node_start_s
        why = f"{first}, the first node, did not start Ray in {waited} s; {look_at([first], self.slurm)}"
        if not self.control.was_counted():  # so that the job is not queued again, and nobody else can say why
            self.control.end(1, why)
        raise JobFailed(why)

    def _follow_generation(self, generation: int) -> None:
        """Join one Ray cluster, until the next one is there or all is over."""
        guard = Reaper()
        try:
            address = self.control.address(generation)
            assert address is not None
            ray = self._start_ray(guard, "--address", address)

            def over() -> bool:
                if self._is_silent(0):
                    raise JobFailed(self._not_heard_of([0]))
                return self.control.address(generation + 1) is not None or self.control.ended() is not None

            self._wait(lambda: over() or ray.poll() is not None, float("inf"))
            if not over():
                self.say("Ray ended on this node")
                self.control.lose(generation, self.node)
        finally:
            guard.close()
