"""The installed command in another folder than the project's: relative paths start there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from launch import run_folder
from tests.support.commands import ROOT, launch
from tests.support.small_recipe import small_recipe, small_values


@pytest.mark.parametrize(("module", "name"), [(None, "hydra-pipeline"), ("launch", "python -m launch")])
def test_help_calls_the_command_as_it_was_called(module: str | None, name: str, tmp_path: Path) -> None:
    assert f"usage: {name} [-h] COMMAND" in (general := launch(tmp_path, "--help", module=module)).out
    assert f"\n  {name} resume quick\n" in general.out
    assert f"\n  {name} data info data/fashion" in launch(tmp_path, "data", "info", "--help", module=module).out


def test_a_relative_recipe_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "small.yaml").write_text(yaml.safe_dump(small_values(Path("data"))))
    shown = launch(tmp_path, "run", "mine/small.yaml", "seed=7", "--dry-run", module=None)
    assert (shown.code, yaml.safe_load(shown.out)["seed"]) == (2, 7), shown.err  # there is no data
    absent = launch(tmp_path, "run", "mine/small.yaml", module=None)
    assert (absent.code, "data.train_file = data/train.beton does not exist" in absent.err) == (2, True)


def test_status_shows_the_runs_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder.write_run_folder(run_folder.RUNS / "mine", small_recipe(tmp_path), {})
    shown = launch(tmp_path, "status", module=None)
    assert (shown.code, "mine" in shown.out) == (0, True), shown.err


def test_data_is_written_and_described(fashion_data: Path, tmp_path: Path) -> None:
    """The writing process imports the project, too."""
    shutil.copytree(fashion_data / "idx", tmp_path / "idx")
    write = ("data", "write", "fashion_mnist", "--source", "idx", "--out", "data", "--workers", "1")
    written = launch(tmp_path, *write, module=None)
    assert written.code == 0, written.err
    described = launch(tmp_path, "data", "info", "data/test.beton", module=None)
    assert (described.code, "fashion_mnist" in described.out) == (0, True), described.err


def test_a_folder_with_another_package_of_our_name_is_refused(tmp_path: Path) -> None:
    """Ray's workers and other processes would import that one."""
    (tmp_path / "launch").mkdir()  # no package
    assert launch(tmp_path, "--help", module=None).code == 0
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").touch()
    refused = launch(tmp_path, "status", module=None)
    assert refused.code == 2
    assert f"{tmp_path}/pipeline/__init__.py would be imported in place of {ROOT}/pipeline/__init__.py" in refused.err
