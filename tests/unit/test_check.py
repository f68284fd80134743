"""Which files `make check` takes for concerned by a change."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import check

FILES = {
    "pipeline/__init__.py": "",
    "pipeline/package/__init__.py": "from pipeline.package.inner import f",
    "pipeline/package/inner.py": "def f(): ...",
    "pipeline/package/other.py": "def g():\n    import pipeline.package.inner",
    "pipeline/user.py": "from pipeline.package import f",
    "pipeline/user_of_user.py": "from pipeline import user",
    "tests/unit/test_user.py": "from pipeline import user",
    "tests/unit/test_whole.py": "import pipeline.user_of_user",
    "tests/unit/test_recipes.py": 'FOLDER = "recipes"',
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(check, "ROOT", tmp_path)


@pytest.mark.parametrize(
    ("changed", "concerned"),
    [
        (
            "pipeline/package/inner.py",
            {"pipeline/package/__init__.py", "pipeline/package/other.py", "pipeline/user.py"},
        ),
        ("pipeline/package/other.py", set()),
        ("pipeline/user.py", {"pipeline/user_of_user.py", "tests/unit/test_user.py"}),
        ("tests/unit/test_user.py", set()),
    ],
)
@pytest.mark.usefixtures("tree")
def test_those_that_import_it_are_concerned_also_through_a_package(changed: str, concerned: set[str]) -> None:
    assert check.importing([Path(changed)]) == {Path(name) for name in (changed, *concerned)}


@pytest.mark.usefixtures("tree")
def test_files_that_are_not_python_concern_the_tests_that_name_their_folder() -> None:
    assert check.importing([Path("recipes/one.yaml")]) == set()
    assert check.naming([Path("recipes/one.yaml")]) == {Path("tests/unit/test_recipes.py")}
