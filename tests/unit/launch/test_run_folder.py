"""Run directories: created once, resumed with the same recipe only, found by name."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from launch import run_folder
from launch.__main__ import main
from launch.commands.status import status_text
from launch.slurm.submit import submit_run
from pipeline.distributed import Group
from pipeline.evaluation.load import load_network
from pipeline.recipe.file import dump_recipe, dump_yaml, file_hash, load_recipe, recipe_hash
from pipeline.recipe.flat_objective import to_flat
from pipeline.recipe.schema import Recipe
from pipeline.run import provenance as provenance_module
from pipeline.run.lease import LeaseHeld, Leases
from pipeline.run.provenance import load_run_recipe
from pipeline.training.hardware import hardware_of

NO_DATA: dict[str, str] = {}
DEMO = Path(__file__).parents[3] / "recipes" / "fashion_mnist.yaml"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe_with(*overrides: str) -> Recipe:
    return load_recipe(DEMO, list(overrides))


def test_a_new_run_holds_its_recipe_and_provenance() -> None:
    folder = run_folder.open_or_create(recipe_with("seed=3"), None, NO_DATA)
    assert folder == Path("runs/fashion_mnist")
    written = load_recipe(folder / "recipe.yaml")
    assert written.seed == 3
    modes = [stat.S_IMODE((folder / file).stat().st_mode) for file in ("recipe.yaml", "provenance.json")]
    assert modes == [0o600, 0o600], "slurm.setup and the command may hold keys"
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["recipe_sha256"] == recipe_hash(written)
    assert set(provenance_module.VERSIONS_OF) == set(provenance["versions"])
    assert provenance["commit"] is None or re.fullmatch("[0-9a-f]{40}", provenance["commit"])


def test_provenance_has_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpus = tmp_path / "cpuinfo"
    cpus.write_text("processor\t: 0\nmodel name\t: A Processor: 2.5 GHz\n\nmodel name\t: another\n")
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(
        "#!/bin/sh\n[ \"$*\" = '--query-gpu=name,driver_version --format=csv,noheader' ] || exit 9\n"
        "echo 'NVIDIA H100 80GB HBM3, 550.54'; echo 'NVIDIA, odd name, 550.54'\n"
    )
    smi.chmod(0o755)
    monkeypatch.setattr(provenance_module, "CPUS", cpus)
    monkeypatch.setenv("PATH", f"{smi.parent}:/usr/bin:/bin")
    provenance = json.loads((run_folder.open_or_create(recipe_with(), "a", NO_DATA) / "provenance.json").read_text())
    alone = Group(0, 1, torch.device("cpu"))
    assert provenance["processor"] == hardware_of(alone, threads=1)["processor"] == "A Processor: 2.5 GHz"
    assert provenance["gpus"] == ["NVIDIA H100 80GB HBM3, driver 550.54", "NVIDIA, odd name, driver 550.54"]
    assert 1 <= provenance["cores"] <= (os.cpu_count() or 1)
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed, as it could not reach the driver'\nexit 9\n")
    monkeypatch.setattr(provenance_module, "CPUS", tmp_path / "none")
    provenance = json.loads((run_folder.open_or_create(recipe_with(), "b", NO_DATA) / "provenance.json").read_text())
    assert provenance["processor"] == hardware_of(alone, threads=1)["processor"] == platform.machine()
    assert provenance["gpus"] == []


def test_data_files_are_absolute_so_that_a_restart_may_come_from_elsewhere(tmp_path: Path) -> None:
    folder = run_folder.open_or_create(
        recipe_with("data.train_file=data/a.beton", "data.test_file=/b.beton"), None, NO_DATA
    )
    data = load_recipe(folder / "recipe.yaml").data
    assert (data.train_file, data.test_file) == (str(tmp_path / "data" / "a.beton"), "/b.beton")


def test_the_same_recipe_resumes_and_may_change_how_it_runs() -> None:
    folder = run_folder.open_or_create(recipe_with(), "mine", NO_DATA)
    provenance = (folder / "provenance.json").read_bytes()
    again = run_folder.open_or_create(recipe_with("workers.threads=3", "tracking.log_every_steps=1"), "mine", NO_DATA)
    assert again == folder == Path("runs/mine")
    assert load_recipe(folder / "recipe.yaml").workers.threads == 3
    assert (folder / "provenance.json").read_bytes() == provenance


def test_another_recipe_is_refused_naming_what_differs() -> None:
    folder = run_folder.open_or_create(recipe_with("phases.prune.lr=0.25"), None, NO_DATA)
    (folder / "pretrain" / "step-00000001").mkdir(parents=True)
    before = (folder / "recipe.yaml").read_bytes()
    other = recipe_with("phases.prune.lr=0.5", "seed=1", "workers.threads=9", "objective.name=trades")
    with pytest.raises(ValueError, match="was started with another recipe") as caught:
        run_folder.open_or_create(other, None, NO_DATA)
    message = str(caught.value)
    for words in (
        str(folder),
        "seed: 0 -> 1",
        "phases.prune.lr: 0.25 -> 0.5",
        "objective.name: pgd -> trades",
        "--name",
    ):
        assert words in message
    assert "workers" not in message  # which may differ
    assert (folder / "recipe.yaml").read_bytes() == before
    assert run_folder.open_or_create(other, "another", NO_DATA) == Path("runs/another")


@pytest.mark.parametrize("path", ["runs/mine", "runs"])
def test_a_file_where_the_run_would_be_is_named(path: str) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("notes")
    with pytest.raises((ValueError, NotADirectoryError), match=r"runs/mine( is a file; choose another --name|'$)"):
        run_folder.open_or_create(recipe_with(), "mine", NO_DATA)
    assert Path(path).read_text() == "notes"


def failed_first_try(*overrides: str) -> Path:
    """What a run leaves that fails before its first checkpoint."""
    folder = run_folder.open_or_create(recipe_with(*overrides), "mine", {"data.train_file": "a" * 64})
    (folder / "pretrain" / "wandb").mkdir(parents=True)
    (folder / "logs").mkdir()
    for name in ("pretrain/stage.json", "pretrain/metrics.jsonl", "pretrain/wandb/run_id", "logs/worker-0.log"):
        (folder / name).write_text("{}\n")
    failure = {"time": time.time(), "attempt": "a", "rank": 0, "stage": None, "step": None, "error": "ValueError: no"}
    (folder / "logs" / "failures.jsonl").write_text(json.dumps(failure) + "\n")
    (folder / "mine.txt").write_text("a note")
    return folder


def test_what_has_trained_nothing_is_begun_anew() -> None:
    folder = failed_first_try("model.num_classes=7", "sparsity.keep_fractions=[0.5]")
    assert "start again: python -m launch run RECIPE --name mine" in " ".join(status_text([folder]).split())
    mended = recipe_with("model.num_classes=10")
    assert run_folder.begins_anew(folder, mended, NO_DATA)
    assert run_folder.open_or_create(mended, "mine", {"data.train_file": "b" * 64}) == folder
    assert load_recipe(folder / "recipe.yaml").model.num_classes == 10
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["recipe_sha256"] == recipe_hash(load_recipe(folder / "recipe.yaml"))
    assert provenance["data_sha256"] == {"data.train_file": "b" * 64}
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left == {"recipe.yaml", "provenance.json", "logs/worker-0.log", "mine.txt"}


def test_a_first_try_whose_recipe_is_refused_today_is_begun_anew() -> None:
    folder = failed_first_try()
    (folder / "recipe.yaml").write_text("data: 1\n")
    assert run_folder.open_or_create(recipe_with(), "mine", NO_DATA) == folder
    assert load_recipe(folder / "recipe.yaml") == load_run_recipe(folder)
    assert not (folder / "pretrain" / "metrics.jsonl").exists()


def test_keys_without_effect_in_the_recipe_of_an_older_run_are_no_error() -> None:
    """Its version accepted keys of other techniques, and those that DeepSpeed does not know."""
    folder = run_folder.open_or_create(recipe_with(), "mine", NO_DATA)
    values = to_flat(YAML(typ="safe", pure=True).load(folder / "recipe.yaml"))
    values["objective"]["replays"] = 7
    values["deepspeed"] = {"zero_optimisation": {"stage": 1}}
    (folder / "recipe.yaml").write_text(dump_yaml(values))
    with pytest.raises(ValueError, match="zero_optimisation: unknown to DeepSpeed"):
        load_recipe(folder / "recipe.yaml")
    older = json.loads((folder / "provenance.json").read_text())
    older["recipe_sha256"] = file_hash(folder / "recipe.yaml")
    (folder / "provenance.json").write_text(json.dumps(older))
    recipe = load_run_recipe(folder)
    assert recipe.objective == recipe_with().objective
    assert "mine" in status_text([folder])
    run_folder.write_run_folder(folder, recipe, NO_DATA)
    assert load_run_recipe(folder) == recipe


def test_links_of_users_to_their_own_disks_are_followed(tmp_path: Path) -> None:
    """A run directory, or `runs` in a folder that happens to have a recipe.yaml."""
    (tmp_path / "disk").mkdir()
    Path("recipe.yaml").touch()
    Path("runs").symlink_to(tmp_path / "disk")
    run_folder.open_or_create(recipe_with(), "mine", NO_DATA)
    (tmp_path / "disk" / "mine").rename(tmp_path / "moved")
    (tmp_path / "disk" / "mine").symlink_to(tmp_path / "moved")
    assert run_folder.open_or_create(recipe_with(), "mine", NO_DATA) == Path("runs/mine")


def test_the_same_try_is_not_begun_anew() -> None:
    folder = failed_first_try()
    (folder / "jobs.json").write_text('{"jobs": []}')
    run_folder.open_or_create(recipe_with(), "mine", {"data.train_file": "a" * 64})
    assert (folder / "jobs.json").exists()
    assert (folder / "pretrain" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "kept", ["pretrain/step-00000009/x", "pretrain/result.json", "keep-0.1/prune/model.safetensors"]
)
def test_what_has_trained_something_keeps_its_recipe(kept: str) -> None:
    folder = failed_first_try()
    (folder / kept).parent.mkdir(parents=True, exist_ok=True)
    (folder / kept).touch()
    with pytest.raises(ValueError, match="was started with another recipe"):
        run_folder.check_start(recipe_with("seed=9"), "mine")
    assert "continue with: python -m launch resume runs/mine" in status_text([folder])


def test_a_folder_of_something_else_is_refused() -> None:
    Path("runs/mine").mkdir(parents=True)
    run_folder.open_or_create(recipe_with(), "mine", NO_DATA)  # empty: nothing can be lost
    Path("runs/other").mkdir()
    Path("runs/other/thesis.tex").write_text("important")
    with pytest.raises(ValueError, match=r"runs/other exists and is not a run .*choose another --name"):
        run_folder.open_or_create(recipe_with(), "other", NO_DATA)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "x" * 65, "/tmp/x", "a\n", "a\nb"])
def test_names_that_are_no_folder_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"--name {name if name.isprintable() else repr(name)}: ")):
        run_folder.open_or_create(recipe_with(), name, NO_DATA)
    assert not Path("runs").exists()


@pytest.mark.parametrize("why", ["no git", "no repository", "another repository"])
def test_provenance_without_a_commit(why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if why == "no git":
        monkeypatch.setattr(shutil, "which", lambda _: None)
    else:
        package = tmp_path / ".venv" / "pipeline" / "__init__.py"
        package.parent.mkdir(parents=True)
        package.touch()
        monkeypatch.setattr(provenance_module, "SOURCE", package.parent)
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    if why == "another repository":
        identity = ["-c", "user.name=me", "-c", "user.email=me@here"]
        for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "theirs"]):
            subprocess.run(["git", *command], cwd=tmp_path, check=True, timeout=20)
    folder = run_folder.open_or_create(recipe_with(), None, NO_DATA)
    assert json.loads((folder / "provenance.json").read_text())["commit"] is None


def test_runs_are_found_by_name_and_by_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine: no such run; runs here: none"):
        run_folder.find_run("mine")
    folder = run_folder.open_or_create(recipe_with(), "mine", NO_DATA)
    run_folder.open_or_create(recipe_with(), "second", NO_DATA)
    for reference in ("mine", "runs/mine", "runs/mine/", str(tmp_path / "runs" / "mine")):
        assert run_folder.find_run(reference).resolve() == folder.resolve()
    with pytest.raises(ValueError, match="third: no such run; runs here: mine, second"):
        run_folder.find_run("third")


@pytest.fixture
def on_real_data(fashion_data: Path, tmp_path: Path) -> Recipe:
    """The demo's recipe on files of its own, so that a test may replace them."""
    shutil.copytree(fashion_data, tmp_path / "data", ignore=shutil.ignore_patterns("idx"))
    files = ("data.train_file=data/train.beton", "data.test_file=data/test.beton")
    return recipe_with(*files, "data.train_images=null")


def test_a_data_file_replaced_under_a_run_is_refused(on_real_data: Recipe) -> None:
    folder = run_folder.open_or_create(on_real_data, "mine", run_folder.check_data(on_real_data))
    run_folder.check_same_data(folder)
    for suffix in (".beton", ".beton.manifest.json"):
        shutil.copy(f"data/test{suffix}", f"data/train{suffix}")
    with pytest.raises(ValueError, match=r"data\.train_file was replaced after runs/mine was started"):
        run_folder.check_same_data(folder)


def test_data_of_another_kind_is_refused_naming_the_fix(on_real_data: Recipe) -> None:
    other = on_real_data.model_copy(update={"data": on_real_data.data.model_copy(update={"dataset": "image_folder"})})
    with pytest.raises(ValueError, match=r"data\.train_file = .*holds fashion_mnist.*set data\.dataset=fashion_mnist"):
        run_folder.check_data(other)


def test_a_recipe_is_not_changed_under_those_who_run_it() -> None:
    folder = run_folder.open_or_create(recipe_with(), "mine", NO_DATA)
    before = (folder / "recipe.yaml").read_bytes()
    leases = Leases([folder / "pretrain"])
    try:
        with pytest.raises(LeaseHeld, match=f"pretrain is being written by pid {os.getpid()}"):
            run_folder.open_or_create(recipe_with("workers.threads=3"), "mine", NO_DATA)
    finally:
        leases.release()
    assert (folder / "recipe.yaml").read_bytes() == before
    run_folder.open_or_create(recipe_with("workers.threads=3"), "mine", NO_DATA)
    assert load_recipe(folder / "recipe.yaml").workers.threads == 3


def test_a_recipe_edited_under_a_run_is_refused() -> None:
    """Its stages would be trained by two recipes. Sections that decide no result may be edited."""
    folder = run_folder.open_or_create(recipe_with("seed=1"), "mine", NO_DATA)
    path = folder / "recipe.yaml"
    text = path.read_text()
    path.write_text(text.replace("log_every_steps: 25", "log_every_steps: 26"))
    load_run_recipe(folder)
    path.write_text(text.replace("seed: 1", "seed: 2"))
    reason = (
        "mine/recipe.yaml was edited after the run was started: .*; restore it, or start a run of the edited recipe"
    )
    for use in (load_run_recipe, run_folder.check_same_data, submit_run, load_network):
        with pytest.raises(ValueError, match=reason):
            use(folder)
    (folder / "pretrain").mkdir()
    (folder / "pretrain" / "result.json").touch()  # something is trained
    with pytest.raises(ValueError, match=reason):
        run_folder.open_or_create(recipe_with("seed=2"), "mine", NO_DATA)


def test_a_recipe_resolved_by_an_older_version_is_not_edited() -> None:
    """Its hash is of the keys that version knew; a start with the same recipe records the hash of today's keys."""
    folder = run_folder.open_or_create(recipe_with("seed=1"), "mine", NO_DATA)
    values = YAML(typ="safe", pure=True).load(folder / "recipe.yaml")
    del values["evaluation"]["validation_steps"]
    (folder / "recipe.yaml").write_text(dump_yaml(values))
    provenance = json.loads((folder / "provenance.json").read_text())
    older = provenance | {"recipe_sha256": file_hash(folder / "recipe.yaml")}
    assert older != provenance
    (folder / "provenance.json").write_text(json.dumps(older))
    recipe = load_run_recipe(folder)
    assert run_folder.open_or_create(recipe, "mine", NO_DATA) == folder
    assert json.loads((folder / "provenance.json").read_text())["recipe_sha256"] == recipe_hash(recipe)


@pytest.mark.parametrize("path", sorted(DEMO.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_resolved_recipes_file_has_the_recipes_hash(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert file_hash(tmp_path / "recipe.yaml") == recipe_hash(recipe)


def test_a_folder_that_may_not_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_folder, "check_data", lambda _: NO_DATA)
    Path("runs").write_text("a file in the way, which stops even root")
    assert main(["run", str(DEMO), "--name", "mine"]) == 2
    error = capsys.readouterr().err
    assert error == "error: runs/mine: Not a directory; check its permissions, or name another path\n"
    Path("runs").unlink()

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["run", str(DEMO), "--name", "mine"]) == 2
    error = capsys.readouterr().err
    assert error == "error: runs/mine: Permission denied; check its permissions, or name another path\n"
