"""The documentation agrees with the code: recipe keys and their defaults, command lines, the loading snippet."""

from __future__ import annotations

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from launch.__main__ import build_parser
from pipeline.models import build_network
from pipeline.models.export import write_model
from pipeline.models.state import effective_state
from pipeline.recipe.errors import sections_in
from pipeline.recipe.file import load_recipe, parse_yaml
from pipeline.recipe.objective import TECHNIQUES
from pipeline.recipe.schema import Recipe
from pipeline.recipe.sections import Model
from pipeline.recipe.technique import Technique
from pipeline.recipe.threat_model import ThreatModel
from tests.support.commands import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KEY_ROW = re.compile(r"^\| `([a-z0-9_.<>]+)` \| [^|]+ \| `?([^|]*?)`? \|", re.MULTILINE)
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
RECIPE_ROW = re.compile(
    r"^\| \[`(\w+)`\]\(\.\./recipes/\1\.yaml\) \| `(\w+)` \| `(\w+)` \| `(\w+)` \| ([\d., ]+) % \|", re.MULTILINE
)
COMMAND = re.compile(r"python -m launch\b([^`\n]*)")
REQUIRED = "required"


TECHNIQUE_ROW = re.compile(r"^\| (\w+) \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", re.MULTILINE)


def keys_of(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> default as plain YAML value, or REQUIRED, for every key that holds a value."""
    keys: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = sections_in(field.annotation)
        repeats_another = bool(prefix) and not field.is_required() and field.default is None
        if inner and not repeats_another:
            for section in inner:  # the members of a union
                own = keys_of(section, f"{prefix}{name}.")
                if len(inner) > 1:
                    default = field.get_default(call_default_factory=True)
                    own[f"{prefix}{name}.name"] = REQUIRED if field.is_required() else default.name
                assert own == own | {key: keys[key] for key in keys.keys() & own.keys()}, (
                    "they agree in what they share"
                )
                keys |= own
        else:
            default = field.get_default(call_default_factory=True)
            keys[prefix + name] = REQUIRED if field.is_required() else default
    return keys


def documented() -> dict[str, str]:
    """Dotted key -> what docs/recipes.md gives as its default; a row of `<phase>` stands for each phase."""
    rows = KEY_ROW.findall((ROOT / "docs" / "recipes.md").read_text())
    pairs = [
        (key.replace("<phase>", phase), default)
        for key, default in rows
        for phase in (("pretrain", "prune", "finetune") if "<phase>" in key else ("",))
    ]
    keys = dict(pairs)
    assert len(keys) == len(pairs), "a key is documented twice"
    return keys


def test_every_recipe_key_is_documented_and_no_other():
    assert documented().keys() == keys_of(Recipe).keys()


def test_documented_defaults_are_the_models_defaults():
    said = {key: default if default == REQUIRED else parse_yaml(default, key) for key, default in documented().items()}
    true = {key: list(value) if isinstance(value, tuple) else value for key, value in keys_of(Recipe).items()}
    assert said == true


def test_the_table_of_techniques_is_true():
    rows = {
        name: (keys, norms) for name, keys, norms in TECHNIQUE_ROW.findall((ROOT / "docs" / "recipes.md").read_text())
    }
    assert list(rows)[1:] == list(TECHNIQUES), "after the heading"
    for name, technique in TECHNIQUES.items():
        fields = [(key, field.is_required()) for key, field in technique.model_fields.items() if key != "name"]
        keys = ", ".join(f"**`{key}`**" if required else f"`{key}`" for key, required in fields)
        values = {"name": name, **{key: "1/8" for key, required in fields if required}}
        legal = {norm: trains(technique.model_validate(values), norm) for norm in (None, "linf", "l2")}
        norms = "any" if legal["linf"] and legal["l2"] else "`linf`" if legal["linf"] else "`l2`"
        assert rows[name] == (keys or "none", f"{norms}, or null" if legal[None] else norms)


def trains(technique: Technique, norm: str | None) -> bool:
    threat_model = None if norm is None else ThreatModel.model_validate({"norm": norm, "eps": "1/8"})
    try:
        technique.check_threat_model("objective", threat_model)
    except ValueError:
        return False
    return True


def test_the_table_of_recipes_is_true():
    said = {row[0]: row[1:] for row in RECIPE_ROW.findall((ROOT / "docs" / "recipes.md").read_text())}
    true = {}
    for path in RECIPES:
        recipe = load_recipe(path, [])
        pruned = ", ".join(f"{float(100 * (1 - keep)):g}" for keep in recipe.sparsity.keep_fractions)
        true[path.stem] = (recipe.data.dataset, recipe.model.arch, recipe.objective.name, pruned)
    assert said == true


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_headers_of_recipes_quote_commands_that_parse(path: Path):
    header = path.read_text().split("\nname: ")[0]
    found = [shlex.split(arguments.rstrip(" )")) for arguments in COMMAND.findall(header)]
    assert ["run", f"recipes/{path.name}"] in found
    written = [build_parser().parse_args(arguments).out for arguments in found if arguments[:2] == ["data", "write"]]
    recipe = load_recipe(path, [])
    for part in ("train", "test"):
        assert getattr(recipe.data, f"{part}_file") in [f"{out}/{part}.beton" for out in written] or not written


def commands() -> list[tuple[str, str]]:
    """(page, arguments) of every command line of this project that the documentation quotes."""
    return [
        (page.name, arguments.strip())
        for page in PAGES
        for arguments in COMMAND.findall(page.read_text().replace("\\\n", " "))
    ]


def test_the_documentation_quotes_every_command():
    first_words = {arguments.split()[0] for _, arguments in commands()}
    assert {"run", "resume", "report", "evaluate", "data", "--help"} <= first_words


@pytest.mark.parametrize(("page", "arguments"), commands())
def test_quoted_commands_parse(page: str, arguments: str, capsys: pytest.CaptureFixture[str]):
    try:
        build_parser().parse_args(shlex.split(arguments, comments=True))
        code = 0
    except SystemExit as ended:
        code = ended.code
    assert code == 0, f"{page}: python -m launch {arguments}: {capsys.readouterr().err}"


def test_the_loading_snippet_gives_the_networks_own_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (snippet,) = [s for s in snippets if "load_state_dict" in s]
    model = Model(arch="resnet18", num_classes=7)
    network = build_network(model, seed=0).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(images)
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model.safetensors", effective_state(network), model, {"keep_fraction": "0.1"})
    names: dict[str, Any] = {"images": images}
    exec(snippet, names)
    torch.testing.assert_close(names["logits"], expected, rtol=0, atol=0)
    assert expected.std() > 0
    assert names["facts"]["keep_fraction"] == "0.1"


def test_every_test_file_is_collected(request: pytest.FixtureRequest) -> None:
    """pytest leaves out folders of some names, such as dist and build, unless it is configured otherwise."""
    left_out = request.config.getini("norecursedirs")
    folders = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parts[:-1]}
    assert "distributed" in folders
    assert [name for name in folders for pattern in left_out if fnmatch(name, pattern)] == []
