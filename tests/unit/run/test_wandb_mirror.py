"""The real wandb client may be slow, missing, wrong or unreachable without an effect on the caller."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import wandb

from pipeline.run.tracking import wandb_mirror
from pipeline.run.tracking.wandb_ids import forget_run
from pipeline.run.tracking.wandb_mirror import LONGEST_TITLE, Label, Mirror
from tests.support.wandb_files import recorded, warnings_in

pytestmark = pytest.mark.usefixtures("no_wandb_account")
KEY = "0123456789" * 4


def start(folder: Path, mode: Any = "offline") -> Mirror:
    return Mirror(Label(folder, "hydra", "demo", "keep-0.1/prune", "prune", {"seed": 7}, {"train/*": "epoch"}), mode)


def test_alerts_are_logged_and_truncated_to_wandbs_limits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mirrored = start(tmp_path)
    mirrored.alert("Run stopped", "at step 7", "WARN")
    mirrored.alert("x" * 99, "y" * 9999, "ERROR")
    mirrored.finish()
    (wandb_run,) = recorded(tmp_path)
    assert wandb_run.alerts[0] == ("Run stopped", "at step 7", "WARN")
    assert wandb_run.alerts[1] == ("x" * LONGEST_TITLE, "y" * 1000, "ERROR")
    assert warnings_in(caplog) == []


def test_an_action_that_fails_is_a_warning_and_the_rest_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirrored = start(tmp_path)
    mirrored.do("the impossible", lambda run: run.log_artifact("/no/such/file"))
    mirrored.row(0, {"train/loss": 1.0})
    mirrored.finish()
    (message,) = warnings_in(caplog)
    assert message.startswith("wandb does not have the impossible: ")
    (wandb_run,) = recorded(tmp_path)
    assert [row["train/loss"] for row in wandb_run.rows] == [1.0]


def test_artifacts_and_lineage_are_left_out_offline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mirrored = start(tmp_path)
    mirrored.uses("demo-pretrain")
    mirrored.produces("demo-keep-0.1-prune", "model", [tmp_path / "missing"], {})
    mirrored.finish()
    assert warnings_in(caplog) == []


class OnlineRun:
    """A fake online run that records what is done with it."""

    offline = False

    def __init__(self, artifacts: list[str]) -> None:
        self.artifacts, self.used, self.logged, self.ended = artifacts, [], [], False
        self.tags: tuple[str, ...] = ()

    def use_artifact(self, name: str) -> None:
        if name not in self.artifacts:
            raise ValueError(f"there is no {name}")
        self.used.append(name)

    def log_artifact(self, artifact: wandb.Artifact) -> None:
        self.logged.append(artifact)

    def finish(self, exit_code: int) -> None:
        self.ended = True


def test_online_a_network_is_an_artifact_with_its_lineage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tests the client only, since artifacts are uploaded by a separate protocol."""
    run = OnlineRun(["demo-pretrain:latest"])
    monkeypatch.setattr(wandb_mirror, "_start", lambda *_: (run, 0))
    network = tmp_path / "model.safetensors"
    network.write_bytes(b"weights")
    mirrored = start(tmp_path)
    mirrored.uses("demo-pretrain")
    mirrored.uses("demo-not-uploaded-yet")
    mirrored.produces("demo-keep-0.1-prune", "model", [network], {"sparsity": 0.9}, "# A card")
    assert mirrored.finish()
    assert run.used == ["demo-pretrain:latest"]
    (artifact,) = run.logged
    assert (artifact.name, artifact.type, artifact.metadata) == ("demo-keep-0.1-prune", "model", {"sparsity": 0.9})
    assert artifact.description == "# A card"
    (entry,) = artifact.manifest.entries.values()
    assert (entry.path, entry.size, entry.local_path) == ("model.safetensors", 7, str(network))
    (message,) = warnings_in(caplog)
    assert "the lineage from demo-not-uploaded-yet" in message
    assert run.ended


def test_lineage_is_recorded_in_every_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [OnlineRun(["demo-pretrain:latest"]) for _ in range(2)]
    remaining = list(runs)
    monkeypatch.setattr(wandb_mirror, "_start", lambda *_: (remaining.pop(0), 0))
    mirrored = start(tmp_path)
    mirrored.uses("demo-pretrain")
    forget_run(tmp_path)
    mirrored.start_new_run("went back")
    assert mirrored.finish()
    assert [run.used for run in runs] == [["demo-pretrain:latest"]] * 2
    assert [run.tags for run in runs] == [("went back",), ()]
    assert all(run.ended for run in runs)


def test_disabled_by_the_environment_wandb_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In particular, it does not mark earlier offline runs as synced."""
    mirrored = start(tmp_path)
    mirrored.row(0, {"train/loss": 1.0})
    assert mirrored.finish()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    mirrored = start(tmp_path, "auto")
    mirrored.row(1, {"train/loss": 1.0})
    assert not mirrored.finish()
    assert len(recorded(tmp_path)) == 1
    assert not list(tmp_path.rglob("*.synced"))


def test_an_unreachable_server_means_offline_and_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_mirror, "INIT_SECONDS", 2.0)
    mirrored = start(tmp_path, "online")
    mirrored.row(0, {"train/loss": 1.0})
    mirrored.alert("Run stopped", "", "WARN")
    mirrored.uses("demo-pretrain")
    mirrored.finish()
    (message,) = warnings_in(caplog)
    assert "keep-0.1/prune is recorded offline" in message
    assert "\n" not in message
    (wandb_run,) = [start for start in recorded(tmp_path) if start.rows]
    assert wandb_run.rows[0]["train/loss"] == 1.0
    assert KEY.encode() not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_online_without_a_key_means_offline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mirrored = start(tmp_path, "online")
    mirrored.row(0, {"train/loss": 1.0})
    mirrored.finish()
    (message,) = warnings_in(caplog)
    assert "API key" in message
    (wandb_run,) = [start for start in recorded(tmp_path) if start.rows]
    assert wandb_run.rows[0]["train/loss"] == 1.0


def test_finish_does_not_wait_for_a_mirror_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    def hang(*_: Any) -> None:
        release.wait(60)
        raise RuntimeError("released")

    monkeypatch.setattr(wandb_mirror, "_start", hang)
    monkeypatch.setattr(wandb_mirror, "FINISH_SECONDS", 0.05)
    mirrored = start(tmp_path)
    mirrored.row(0, {"train/loss": 1.0})
    mirrored.finish()
    assert "did not finish" in caplog.text
    release.set()
    thread = mirrored._thread
    thread.join(60)
    assert not thread.is_alive()
    mirrored.row(1, {"train/loss": 1.0})
    mirrored.finish()


def test_no_call_waits_for_a_server_that_accepts_and_never_responds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The calls return at once; only finish waits, up to its deadline."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_mirror, "INIT_SECONDS", 1.0)
    monkeypatch.setattr(wandb_mirror, "FINISH_SECONDS", 30.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        mirrored = start(tmp_path, "online")
        for number in range(100):
            mirrored.row(number, {"train/loss": 1.0})
        mirrored.alert("Run stopped", "", "WARN")
        mirrored.finish()
    assert [message for message in warnings_in(caplog) if "offline" in message]
    assert [len(start.rows) for start in recorded(tmp_path) if start.rows] == [100]


@pytest.mark.parametrize(("variable", "mode"), [("WANDB_API_KEY", "online"), (None, "offline")])
def test_auto_is_online_exactly_with_a_key(monkeypatch: pytest.MonkeyPatch, variable: str | None, mode: str) -> None:
    if variable:
        monkeypatch.setenv(variable, KEY)
    assert wandb_mirror.choose_mode() == mode


def test_auto_finds_a_netrc_key_and_obeys_wandb_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_mirror.choose_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mirror.choose_mode() == "disabled"
