"""A real SLURM on this machine, for tests: several nodes, accounting, and a partition that preempts the other one.

Every daemon runs in the foreground as a child of this process, on loopback, with its files in one folder; the system's
own configuration is not read. Jobs run as the user who runs the tests, who need not be root.

Behaviour measured with version 22.05.8:

Preemption of a job in `low`. At once, every process of its steps gets SIGCONT and the signal of --signal if the cluster
warns, or SIGTERM if it does not or the job has requested no signal. The batch shell gets nothing yet; with --signal=B:
only the shell gets the signal, and a shell without a trap dies of it, so that the job is FAILED and not requeued. The
job is ended between GRACE_S and 30 s later, as slurmctld checks only every 30 s: SIGTERM and SIGCONT to every process,
including the shell, and SIGKILL 5 s after that. The job starts again 6 s after its end.

A dead slurmd is detected after 25 to 33 s (NODE_LOST_S plus slurmctld's polling interval). The job is requeued, gets
SIGTERM and, 5 s later, SIGKILL on its other nodes, and runs again on other nodes 36 to 48 s after the death. Its
processes on the lost node keep running until that node's slurmd is back. A node that dies with all its processes and
returns before it is detected costs more: slurmctld checks the job only after 80 to 95 s.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType

import psutil

from tests.support.commands import wait_until

CPUS, GPUS, MEMORY_MB, FEATURE = 4, 8, 8000, "a100"
"""Declared resources of each node, independent of the machine's. GPUs are only counted, there are no devices."""
GRACE_S = 8
"""Between a preemption's warning and the end of the job."""
NODE_LOST_S = 15
"""A node that does not respond for so long is down."""
_LONGEST_FOLDER = 60  # it contains the daemons' sockets, whose paths may have 107 characters
_PORTS = range(20000, 32000)  # outside Linux's ephemeral range and that of Ray's workers
_START_S, _END_S = 30, 15
_DAEMONS_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"

_SLURM_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts again a second after its old credential has expired: 120 s by default, and 4 is refused.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MailProg={folder}/mail
MpiDefault=none

ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting_port}
AccountingStoragePass={folder}/munge.sock
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations,qos

SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{warning}
SlurmdParameters=config_overrides
JobRequeue=1
OverTimeLimit=0
KillWait=5
MinJobAge=120
MessageTimeout=10
ReturnToService=2
SlurmctldTimeout=60
SlurmdTimeout={node_lost_s}

GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s} State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""
_NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory={memory} "
    "Gres=gpu:{feature}:{gpus} Feature={feature}"
)
_SLURMDBD_CONF = """\
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={accounting_port}
SlurmUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""


class SlurmCluster:
    """Nodes n1, n2, ... and the partitions `low` (default, can be preempted) and `high`; a context manager.

    folder: new or empty, with a short path. Errors: FileNotFoundError naming the programs that are not installed.
    """

    def __init__(self, folder: Path, nodes: int = 4, warn_before_preemption: bool = True) -> None:
        if len(str(folder)) > _LONGEST_FOLDER:
            raise ValueError(
                f"{folder}: a path of at most {_LONGEST_FOLDER} characters is needed for the sockets in it"
            )
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._host = socket.gethostname().partition(".")[0]
        self._ports = dict(zip(["slurmctld", "slurmdbd", *self.nodes], _free_ports(nodes + 2), strict=True))
        self._warn = self._initial_warn = warn_before_preemption
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}  # in the order of their starts

    def __enter__(self) -> SlurmCluster:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start every daemon, each once those that it depends on respond."""
        programs = {name: _program(name) for name in _PROGRAMS}
        if missing := [name for name, path in programs.items() if path is None]:
            raise FileNotFoundError(
                f"not installed: {', '.join(missing)}; `make setup` installs them on Debian and Ubuntu, "
                "or says how (if it already has: remove .venv/without-slurm first)"
            )
        for path in (self.folder, *(self.folder / name for name in ("state", "spool", "log"))):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._write_configuration()
        self._start_munged()
        self._start_database()
        self._start_accounting()
        self._start("slurmctld", "slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        for node in self.nodes:
            self.start_slurmd(node)

    def wait_ready(self) -> None:
        """Return once every node is idle."""

        def ready() -> bool:
            states = self._node_states(",".join(self.nodes))
            return len(states) == len(self.nodes) and set(states) == {"idle"}

        self._wait("slurmctld", lambda: self._succeeds("scontrol", "ping") and ready(), "every node is idle")

    def stop(self) -> None:
        """Stop every daemon and kill all processes of jobs. Errors: AssertionError if some cannot be killed."""
        # Nodes first, so that nothing more is started.
        for process in reversed(self._daemons.values()):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._daemons.clear()

        def job_processes() -> list[psutil.Process]:
            """Those that are not children of this process, which the tests themselves have to end."""
            return list(set(self.processes()) - set(psutil.Process().children(recursive=True)))

        try:
            _kill_all(job_processes, "the end of all processes of jobs")
        except TimeoutError as error:
            raise AssertionError(f"{error}: {job_processes()}") from None
        shutil.rmtree(self.folder / "database", ignore_errors=True)  # the logs stay, for debugging

    # --- used by tests -------------------------------------------------------------------------------------------

    def client(self, *argv: str, deadline_s: float = 30) -> str:
        """Run sbatch, squeue, scontrol, sacct, ...; returns its stdout. Errors: RuntimeError with its stderr."""
        done = subprocess.run(
            argv, env=self._environment(), capture_output=True, text=True, timeout=deadline_s, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def reset(self) -> None:
        """Restore the state after the start: no job, every node idle, the initial setting of the warning."""
        if jobs := self.client("squeue", "--noheader", "--format=%A").split():
            self.client("scancel", *jobs)
        for process in self.processes():
            if _node_of(process) and not _is_step(process):
                _kill(process)  # at once; after scancel, a process that ignores SIGTERM lives on for KillWait
        for node in self.nodes:
            if f"slurmd-{node}" not in self._daemons:
                self.start_slurmd(node)
        self.wait_ready()
        self.set_warning(self._initial_warn)

    def submit(self, *arguments: str) -> str:
        """`sbatch` with these arguments; returns the job's id."""
        return self.client("sbatch", "--parsable", *arguments).strip()

    def job_state(self, job_id: str | int) -> str:
        """From squeue while the controller knows the job, then from sacct: PENDING, RUNNING, COMPLETED, ..."""
        try:
            state = self.client("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T")
        except RuntimeError as error:
            if "Invalid job id" not in str(error):
                raise
            state = ""
        state = state or self.client("sacct", "-X", "--noheader", "--parsable2", f"--jobs={job_id}", "--format=State")
        if not state.strip():
            raise LookupError(f"neither squeue nor sacct knows job {job_id}")
        return state.split()[0]  # "CANCELLED by 0"

    def wait_for_state(self, job_id: str | int, states: str | Collection[str], deadline_s: float = 60) -> str:
        """Wait until the job is in one of the states; returns its state. Errors: TimeoutError with its last state."""
        targets = {states} if isinstance(states, str) else set(states)
        state = ""

        def is_reached() -> bool:
            nonlocal state
            state = self.job_state(job_id)
            return state in targets

        try:
            wait_until(is_reached, deadline_s, f"job {job_id} is {' or '.join(sorted(targets))}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it is {state}") from None
        return state

    def job_nodes(self, job_id: str | int) -> list[str]:
        """The nodes on which the job runs now."""
        hostlist = self.client("squeue", "--noheader", f"--jobs={job_id}", "--format=%N").strip()
        return self.client("scontrol", "show", "hostnames", hostlist).split() if hostlist else []

    def mails(self) -> list[str]:
        """The mails sent so far: subject and addressee of each."""
        path = self.folder / "mails"
        return path.read_text().splitlines() if path.exists() else []

    def node_state(self, node: str) -> str:
        """From sinfo, without its flag characters: idle, mixed, allocated, completing, down, ..."""
        return "".join(self._node_states(node))

    def _node_states(self, nodes: str) -> list[str]:
        states = self.client("sinfo", "--noheader", "--Node", "--partition=low", f"--nodes={nodes}", "--format=%T")
        return [re.sub("[^a-z]", "", line) for line in states.splitlines()]

    def wait_for_node(self, node: str, state: str, deadline_s: float = 60) -> None:
        wait_until(lambda: self.node_state(node) == state, deadline_s, f"node {node} is {state}")

    @property
    def warns(self) -> bool:
        """Whether a job's --signal is sent when it is about to be preempted."""
        return self._warn

    def set_warning(self, on: bool) -> None:
        """Set `warns`.

        Waits until no job runs: a message that reaches slurmctld while it reloads its configuration is lost, and a node
        whose job has just ended then stays `completing` for half a minute.
        """
        if on == self._warn:
            return
        self.wait_ready()
        self._warn = on
        self._write_configuration()
        self.client("scontrol", "reconfigure")

    def start_slurmd(self, node: str) -> None:
        spool = self.folder / "spool" / node
        spool.mkdir(exist_ok=True)
        self._start(f"slurmd-{node}", "slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"], place=spool)

    def processes(self) -> list[psutil.Process]:
        """Living daemons, job steps, and all processes that jobs have started."""
        return [process for process in psutil.process_iter() if self._is_of_cluster(process)]

    def _is_of_cluster(self, process: psutil.Process) -> bool:
        """Whether its environment names this cluster, as that of daemons and jobs does, even with --export=NONE.

        slurmstepd and slurmscriptd overwrite theirs with their titles, but stay in the folder in which they started.
        """
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                return False
            if process.name().startswith("slurm") and Path(process.cwd()).is_relative_to(self.folder):
                return True
            return process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    # --- the daemons ---------------------------------------------------------------------------------------------

    def _environment(self) -> dict[str, str]:
        """This process's own, without the variables of a SLURM job that it may be part of."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(SLURM_PREFIXES)}
        return own | self.environment

    def _write_configuration(self) -> None:
        host, user = self._host, _user()
        facts = {
            "host": host,
            "user": user,
            "folder": self.folder,
            "controller_port": self._ports["slurmctld"],
            "accounting_port": self._ports["slurmdbd"],
            "warning": "SlurmctldParameters=preempt_send_user_signal" if self._warn else "",
            "node_lost_s": NODE_LOST_S,
            "grace_s": GRACE_S,
            "nodes": "\n".join(
                _NODE.format(
                    name=name,
                    host=host,
                    port=self._ports[name],
                    cpus=CPUS,
                    memory=MEMORY_MB,
                    gpus=GPUS,
                    feature=FEATURE,
                )
                for name in self.nodes
            ),
        }
        accounting = self.folder / "slurmdbd.conf"
        accounting.touch(0o600)
        accounting.write_text(_SLURMDBD_CONF.format(**facts))
        (self.folder / "slurm.conf").write_text(_SLURM_CONF.format(**facts))
        mail = self.folder / "mail"
        mail.write_text(f'#!/bin/sh\necho "$*" >> {self.folder}/mails\n')
        mail.chmod(0o755)
        # A GPU without a device file is not counted. The scheduler does not open the files; names must differ.
        for number in range(GPUS):
            device = self.folder / f"gpu{number}"
            device.unlink(missing_ok=True)
            device.symlink_to(os.devnull)
        gpus = f"Name=gpu Type={FEATURE} File={self.folder}/gpu[0-{GPUS - 1}]"
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{gpus}\n")
        # No cgroups: they need systemd, or permissions that a container lacks. `disabled` is new in 23.02; earlier, the
        # plugin for cgroup v1 has no effect unless it is used.
        plugin = "disabled" if _slurm_version() >= (23, 2) else "cgroup/v1"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")

    def _start_munged(self) -> None:
        key, socket_path = self.folder / "munge.key", self.folder / "munge.sock"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        files = {
            "key-file": key,
            "socket": socket_path,
            "pid-file": self.folder / "munged.pid",
            "seed-file": f"{key}.seed",
        }
        self._start(
            "munged", "munged", "--foreground", "--force", *(f"--{name}={file}" for name, file in files.items())
        )
        self._wait("munged", lambda: _listens(str(socket_path)), "munged responds")

    def _start_database(self) -> None:
        data, socket_path = self.folder / "database", self.folder / "database.sock"
        common = ["--no-defaults", f"--datadir={data}", "--innodb-log-file-size=4M", "--innodb-buffer-pool-size=16M"]
        common += ["--user=root"] if os.getuid() == 0 else []
        install = [_program("mariadb-install-db") or "", *common, "--auth-root-authentication-method=normal"]
        result = subprocess.run(
            [*install, "--skip-test-db", "--skip-name-resolve"], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise RuntimeError(f"mariadb-install-db ended with {result.returncode}: {result.stdout}{result.stderr}")
        options = ["--skip-networking", f"--socket={socket_path}", f"--pid-file={self.folder}/database.pid"]
        options += ["--innodb-flush-log-at-trx-commit=0", f"--tmpdir={data}"]
        self._start("mariadbd", "mariadbd", *common, *options)
        self._wait("mariadbd", lambda: _listens(str(socket_path)), "the database responds")

    def _start_accounting(self) -> None:
        # slurmdbd.conf cannot name a socket; the client library reads this variable.
        socket_path = {"MYSQL_UNIX_PORT": str(self.folder / "database.sock")}
        self._start("slurmdbd", "slurmdbd", "-D", more_environment=socket_path)
        address = ("127.0.0.1", self._ports["slurmdbd"])
        self._wait("slurmdbd", lambda: _listens(address), "slurmdbd responds")
        self.client("sacctmgr", "--immediate", "add", "cluster", "tests")
        self.client("sacctmgr", "--immediate", "add", "account", "tests", "Cluster=tests")
        self.client("sacctmgr", "--immediate", "add", "user", _user(), "Account=tests")

    def _start(
        self, name: str, *argv: str, place: Path | None = None, more_environment: dict[str, str] | None = None
    ) -> None:
        with self._log(name).open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [_program(argv[0]) or argv[0], *argv[1:]],
                env=self._environment() | (more_environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=place or self.folder,
                start_new_session=True,  # Ctrl-C is for pytest only, which then stops them in order
            )

    def _log(self, name: str) -> Path:
        return self.folder / "log" / f"{name}.log"

    def _succeeds(self, *argv: str) -> bool:
        try:
            self.client(*argv)
        except RuntimeError:
            return False
        return True

    def _wait(self, name: str, condition: Callable[[], bool], what: str) -> None:
        """Wait until it holds. Errors: RuntimeError with the end of `name`'s log, or at once if a daemon has ended."""

        def dead_daemons() -> list[str]:
            return [other for other, process in self._daemons.items() if process.poll() is not None]

        try:
            wait_until(lambda: bool(dead_daemons()) or condition(), _START_S, what)
        except TimeoutError as error:
            raise RuntimeError(f"{error}\n{self._tail(name)}") from None
        if dead := dead_daemons():
            raise RuntimeError("\n".join(f"{other} has ended\n{self._tail(other)}" for other in dead))

    def _tail(self, name: str) -> str:
        return "\n".join(self._log(name).read_text(errors="replace").splitlines()[-30:])


SLURM_PREFIXES = ("SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SACCT_", "SINFO_")
"""Environment variables that would direct a command to another cluster or change what it does."""
_PROGRAMS = ("sbatch", "slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db")


def _program(name: str) -> str | None:
    return shutil.which(name, path=_DAEMONS_PATH)


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _slurm_version() -> tuple[int, int]:
    output = subprocess.run(
        [_program("slurmctld") or "slurmctld", "-V"], capture_output=True, text=True, check=True
    ).stdout
    version = re.search(r"(\d+)\.(\d+)", output)
    assert version, output
    return int(version[1]), int(version[2])


def _free_ports(count: int) -> list[int]:
    """Unused ports. Another program may take one before its daemon starts: then the daemon's log says so."""
    probes: list[socket.socket] = []
    try:
        for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
            probe = socket.socket()
            probes.append(probe)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                probes.pop().close()
            if len(probes) == count:
                return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
    raise OSError(f"not {count} free ports between {_PORTS.start} and {_PORTS.stop}")


def _listens(address: str | tuple[str, int]) -> bool:
    """Whether a process accepts connections at a socket's path, or at a host and port."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as probe:
        return probe.connect_ex(address) == 0


def _is_step(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("slurmstepd")
    except psutil.NoSuchProcess:
        return False


def _node_of(process: psutil.Process) -> str | None:
    """The node on which a job's process runs; for slurmstepd, the name of the folder in which its node was started."""
    try:
        return Path(process.cwd()).name if _is_step(process) else process.environ().get("SLURMD_NODENAME")
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # denied while it executes another program
        return None


def _order_of_death(process: psutil.Process) -> int:
    """Order in which to kill: slurmstepd, which reports its task's end; srun's child, which ends the step when srun
    dies; srun; the others."""
    try:
        if _is_step(process):
            return 0
        if process.name() != "srun":
            return 3
        parent = process.parent()
        return 1 if parent is not None and parent.name() == "srun" else 2
    except psutil.NoSuchProcess:
        return 3


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def _kill_all(living: Callable[[], list[psutil.Process]], what: str) -> None:
    """Kill the living processes, and those that they start meanwhile. Errors: TimeoutError naming `what`."""

    def kill_remaining() -> bool:
        remaining = living()
        for process in remaining:
            _kill(process)
        return not remaining

    wait_until(kill_remaining, _END_S, what)
