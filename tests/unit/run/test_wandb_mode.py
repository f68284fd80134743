"""What a person has said to wandb is obeyed: its variables, their older spellings, and its settings files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.run.tracking import wandb_mirror
from pipeline.run.tracking.wandb_mode import asked_mode, settle_mode


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, None),
        ({"WANDB_MODE": ""}, None),
        ({"WANDB_MODE": "online"}, "online"),
        ({"WANDB_MODE": "run"}, "online"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "Offline"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, "disabled"),
        ({"WANDB_DISABLED": "false", "WANDB_MODE": "dryrun"}, "offline"),
    ],
)
def test_variables(environment: dict[str, str], mode: str | None, tmp_path: Path) -> None:
    assert asked_mode({"WANDB_CONFIG_DIR": str(tmp_path), **environment}, tmp_path) == mode


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^WANDB_MODE = of-line: wandb's mode is one of online, .*; set one of them"):
        asked_mode({"WANDB_MODE": "of-line"}, tmp_path)


@pytest.mark.parametrize("place", ["work/wandb", "work/.wandb", "config"])
def test_settings_files(place: str, tmp_path: Path) -> None:
    """`wandb offline` writes the first one."""
    settings = tmp_path / place / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nmode = offline\nbase_url = http://a%b\n")
    environment = {"WANDB_CONFIG_DIR": str(tmp_path / "config")}
    assert asked_mode(environment, tmp_path / "work") == "offline"
    assert asked_mode({**environment, "WANDB_MODE": "online"}, tmp_path / "work") == "online"
    settings.write_text("[default]\nmode = sometimes\n")
    with pytest.raises(ValueError, match=f"mode in {settings} = sometimes: wandb's mode is one of"):
        asked_mode(environment, tmp_path / "work")
    settings.unlink()
    os.mkfifo(settings)
    with pytest.raises(ValueError, match=f"{settings}, wandb's settings, cannot be read: .*it is a FIFO"):
        asked_mode(environment, tmp_path / "work")


@pytest.mark.usefixtures("no_wandb_account")
def test_workers_are_told_what_the_folder_of_the_command_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "")  # so that it is put back
    monkeypatch.chdir(tmp_path)
    settle_mode("disabled")
    assert os.environ["WANDB_MODE"] == ""
    settle_mode("auto")
    monkeypatch.chdir("/")
    assert (os.environ["WANDB_MODE"], wandb_mirror.choose_mode()) == ("offline", "offline")
