"""The notebooks in colab/, as they are: scripts/run_notebooks.py runs them."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((ROOT / "colab").glob("*.ipynb"))}
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Repository"]
OPENING = ("install", "model", "load")
"""Cells, by id, that are the same in all notebooks"""
PARAM = re.compile(r"^(?P<name>[A-Z][A-Z_]*) = (?P<value>.*\S) +# @param (?P<choices>\[.*\])? ?(?P<options>\{.*\})?$")
ELSEWHERE = ("google.colab", "kaggle_secrets", "kaggle_datasets", "requests", "urllib", "huggingface_hub")
"""Modules that are in Colab or Kaggle alone, or that need a network"""
PLACES = ("/content", "/kaggle")

all_notebooks = pytest.mark.parametrize("notebook", NOTEBOOKS.values(), ids=[*NOTEBOOKS])


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code(notebook: dict) -> dict[str, str]:
    """By id, the source of each code cell, without what only IPython understands."""
    cells = {cell["id"]: source(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"}
    return {name: re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", text) for name, text in cells.items()}


def test_there_are_notebooks():
    assert {"text_to_image", "image_to_image", "many_seeds"} <= NOTEBOOKS.keys()


@all_notebooks
def test_they_are_saved_without_outputs(notebook):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len({*ids}) == len(ids)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]


@all_notebooks
def test_every_cell_is_python(notebook):
    for name, text in code(notebook).items():
        compile(text, name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@all_notebooks
def test_every_form_can_be_read(notebook):
    forms = [line for text in code(notebook).values() for line in text.splitlines() if "# @param" in line]
    assert forms
    for line in forms:
        found = PARAM.match(line)
        assert found, line
        value = ast.literal_eval(found["value"])
        options = json.loads(re.sub(r"([{,] *)([\w-]+):", r'\1"\2":', found["options"] or "{}"))
        choices = json.loads(found["choices"] or "[]")
        assert choices or options.keys() & {"type"}, line
        if choices and not options.get("allow-input"):
            assert value in choices, line
        kinds = {"string": str, "integer": int, "number": int | float, "boolean": bool, "slider": int | float}
        assert isinstance(value, kinds.get(options.get("type"), object)), line


@all_notebooks
def test_what_is_elsewhere_is_guarded(notebook):
    """Imports of ELSEWHERE and paths of PLACES are inside an `if`, or are what it asks for."""
    for name, text in code(notebook).items():
        assert not unguarded(ast.parse(text)), name


def unguarded(tree: ast.AST, guarded: bool = False) -> list[str]:
    found = []
    if isinstance(tree, ast.Import | ast.ImportFrom) and not guarded:
        modules = [alias.name for alias in tree.names] if isinstance(tree, ast.Import) else [tree.module]
        found += [name for name in modules if any(f"{name}.".startswith(f"{own}.") for own in ELSEWHERE)]
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str) and not guarded:
        found += [tree.value] if tree.value.startswith(PLACES) else []
    for field, value in ast.iter_fields(tree):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                within = isinstance(tree, ast.If | ast.IfExp) and field in ("test", "body")
                found += unguarded(child, guarded or within)
    return found


def test_what_is_not_guarded_is_found():
    text = "import sys\nif x:\n    import google.colab\nelse:\n    from google.colab import files\nopen('/content/a')"
    assert unguarded(ast.parse(text)) == ["google.colab", "/content/a"]


@pytest.mark.parametrize("cell", OPENING)
def test_the_opening_is_the_same_in_all(cell):
    cells = {name: code(notebook).get(cell) for name, notebook in NOTEBOOKS.items()}
    assert len({text for text in cells.values() if text}) == 1
    assert cell == "load" or all(cells.values()), cells.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_addresses_are_those_of_the_project(name):
    page = f"{REPOSITORY.replace('https://github.com', 'https://colab.research.google.com/github')}/blob/main"
    title = source(NOTEBOOKS[name]["cells"][0])
    assert title.startswith("# ")
    assert f"]({page}/colab/{name}.ipynb)" in title
    assert f'SDJAX = "git+{REPOSITORY}"' in code(NOTEBOOKS[name])["install"]


def test_the_readme_has_a_badge_for_each():
    readme = (ROOT / "README.md").read_text("utf-8")
    page = f"{REPOSITORY.replace('https://github.com', 'https://colab.research.google.com/github')}/blob/main"
    assert {*re.findall(r"\[!\[Open in Colab\]\[colab\]\]\((\S+)\)", readme)} >= {
        f"{page}/colab/{name}.ipynb" for name in NOTEBOOKS
    }


def notebook_of(*sources: str) -> str:
    cells = [
        {"cell_type": "code", "id": f"cell{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": text}
        for i, text in enumerate(sources)
    ]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def test_the_runner_says_what_passed_and_what_failed(tmp_path):
    (tmp_path / "good.ipynb").write_text(notebook_of("import sdjax", "print(sdjax.EMBEDDED_MODEL.name)"))
    (tmp_path / "bad.ipynb").write_text(notebook_of("x = 1", "x / 0  # here"))
    script, names = ROOT / "scripts" / "run_notebooks.py", ("bad.ipynb", "good.ipynb", "--html", "pages")
    done = subprocess.run([sys.executable, script, *names], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"bad: failed in \d+ s\ngood: passed in \d+ s", "\n".join(sorted(done.stdout.splitlines())))
    assert "x / 0  # here" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert "fluent-emoji" in (tmp_path / "pages" / "good.html").read_text("utf-8")
