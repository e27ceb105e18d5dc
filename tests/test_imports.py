"""Imports point one way, and `import sdjax` is light."""

import ast
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import sdjax

ROOT = Path(sdjax.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
PYTORCH = ("torch", "diffusers", "transformers")
FLOORS = (
    "sdjax.commands",
    "sdjax.serve",
    "sdjax.batch",
    "sdjax.training",
    "sdjax.plan",
    "sdjax.engine",
    "sdjax.notebooks.machine",
    "sdjax.notebooks.sweeps",
    "sdjax.pipeline",
    "sdjax.inputs",
    "sdjax.diffusion_pipeline",
    "sdjax.adapters",
    "sdjax.runtime",
    "sdjax.components",
    "sdjax.schedulers",
    "sdjax.text",
    "sdjax.models",
    "sdjax.ops",
    "sdjax.notebooks",
    "sdjax.pictures.metadata",
    "sdjax.pictures.web_ui",
    "sdjax.request",
    "sdjax.pictures",
    "sdjax.checkpoints",
    "sdjax.sampling",
    "sdjax.files",
    "sdjax.fields",
    "sdjax.lazy",
)
"""Each may import those below it, even within a function, and none above."""
FORBIDDEN = {
    "sdjax": PYTORCH,
    "sdjax.ops": ("flax", "sdjax.checkpoints", "sdjax.sampling"),
    "sdjax.models": ("sdjax.sampling",),
    "sdjax.checkpoints": ("sdjax.sampling",),
    "sdjax.pictures": ("jax", "flax"),
    "sdjax.request": ("jax", "flax", "numpy"),
    "sdjax.files": ("jax", "flax", "numpy"),
    "sdjax.fields": ("jax", "flax", "numpy"),
    "sdjax.lazy": ("jax", "flax", "numpy"),
    **{
        f"sdjax.sampling.{path.stem}": ("jax", "flax")
        for path in (ROOT / "sampling").glob("*.py")
        if path.stem not in ("__init__", "guidance", "loop", "noise")
    },
}
"""Whatever is inside the first must not import anything inside the others."""
OPTIONAL = ("pyarrow", "webdataset", "ray", "grain", "tensorboardX")
OPENS_WEIGHTS = ("safetensors", "huggingface_hub")


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imported(path: Path) -> set[str]:
    """All modules that a file imports, anywhere in it; `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_modules_are_found():
    assert {"sdjax", "sdjax.models.unet", "sdjax.checkpoints.folder", "sdjax.sampling.schedule"} <= MODULES.keys()
    assert "sdjax.checkpoints.folder" in imported(MODULES["sdjax.models.base"])


def test_every_module_has_a_floor():
    assert not [name for name in MODULES if name not in ("sdjax", "sdjax.__main__") and floor(name) is None]


def floor(module: str) -> int | None:
    return next((number for number, package in enumerate(FLOORS) if within(module, package)), None)


@pytest.mark.parametrize("package", FLOORS)
def test_imports_point_down(package):
    wrong = [
        f"{name} imports {target}"
        for name, path in MODULES.items()
        if within(name, package)
        for target in imported(path)
        if (number := floor(target)) is not None and number < floor(name)
    ]
    assert not wrong


@pytest.mark.parametrize("package", FORBIDDEN)
def test_what_is_not_imported(package):
    sources = {name: path for name, path in MODULES.items() if within(name, package)}
    assert sources
    wrong = [
        f"{name} imports {target}"
        for name, path in sources.items()
        for target in imported(path)
        if any(within(target, other) for other in FORBIDDEN[package])
    ]
    assert not wrong


TESTED_PRIVATELY = {
    "tests/batch/test_report.py": {"_line"},
    "tests/batch/test_run.py": {"_fetch"},
    "tests/engine/test_calls.py": {"_dispatch", "_to_uint8"},
    "tests/batch/test_timing.py": {"_Cost"},
    "tests/bench/test_bench.py": {"_measured"},
    "tests/test_finite.py": {"_mended"},
    "tests/test_tpu_plan.py": {"_programs"},
}
"""Which the tests in these files look into; the list is to become shorter"""
SOURCES = [path for folder in ("sdjax", "scripts", "tests") for path in sorted((ROOT.parent / folder).rglob("*.py"))]
PUBLIC = ("_asdict", "_replace", "_make", "_fields", "_repr_html_")  # of named tuples, and of what notebooks show


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def reached(tree: ast.AST, ours: set[str]) -> set[str]:
    """The private names that a file takes from elsewhere: imported from our modules, or attributes it does not define.

    ours: the private names that our modules define; what other packages have is theirs.
    """
    nodes = list(ast.walk(tree))
    imports = (node for node in nodes if isinstance(node, ast.ImportFrom) and "sdjax" in node.module)
    names = {alias.name for node in imports for alias in node.names if private(alias.name)}
    found = {node.attr for node in nodes if isinstance(node, ast.Attribute) and private(node.attr)}
    return names | ((found & ours) - defined(tree))


def defined(tree: ast.AST) -> set[str]:
    """The private names that a file gives to functions, classes, variables and attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return {name for name in names if private(name)}


def test_private_names_stay_in_their_file():
    trees = {path.relative_to(ROOT.parent).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    ours = set().union(*map(defined, trees.values()))
    assert {"_params", "_parts"} <= ours
    found = {name: reached(tree, ours) - TESTED_PRIVATELY.get(name, set()) for name, tree in trees.items()}
    assert not {name: names for name, names in found.items() if names}


def test_private_names_are_found():
    code = "from sdjax.models.base import _tuple\nimport sdjax\nsdjax.a._b\nself._c\nx._asdict()\nself._d = 1\nself._d"
    assert reached(ast.parse(code), {"_b", "_c", "_d"}) == {"_tuple", "_b", "_c"}


def test_only_checkpoints_opens_weights_or_asks_the_hub():
    users = {name for name, path in MODULES.items() for target in imported(path) if target.startswith(OPENS_WEIGHTS)}
    assert users
    assert all(within(name, "sdjax.checkpoints") for name in users)


def test_the_arrays_of_variables_are_read_in_one_place():
    """Flax 0.12.0 has no `get_value` and no `set_value`."""
    users = {name for name, path in MODULES.items() if re.search(r"\.[gs]et_value\(", path.read_text("utf-8"))}
    assert users == {"sdjax.checkpoints.variables"}


def test_only_the_command_imports_batch():
    users = {name for name, path in MODULES.items() for target in imported(path) if within(target, "sdjax.batch")}
    assert {name for name in users if not within(name, "sdjax.batch")} == {"sdjax.commands.batch"}


def python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    environ = {**os.environ, **environment}
    return subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout


LOADED = """
import sys, sdjax.commands.main
print(*sys.modules)
import sdjax.pipeline, sdjax.batch.runner
print(*sys.modules)
"""


@pytest.fixture(scope="module")
def bytecode(tmp_path_factory):
    """Where the processes of this file keep theirs."""
    return {"PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("bytecode")), "PYTHONDONTWRITEBYTECODE": ""}


@pytest.fixture(scope="module")
def loaded(bytecode):
    """What the command's help imports, and what sampling and jobs import in all."""
    return [{*line.split()} for line in python(LOADED, **bytecode).splitlines()]


def test_an_import_loads_nothing_of_pytorch_and_nothing_that_is_optional(loaded):
    assert {"sdjax", "sdjax.pipeline", "sdjax.batch.output"} <= loaded[1]
    assert not {*PYTORCH, *OPTIONAL} & loaded[1]


def test_the_commands_help_needs_no_jax_and_no_server(loaded):
    assert "sdjax.commands.main" in loaded[0]
    assert not {"jax", "fastapi", "uvicorn"} & loaded[0]


COST = """
from time import process_time
start = process_time()
import jax, flax.nnx
theirs = process_time()
import sdjax.pipeline
print((process_time() - start) / (theirs - start))
"""


def test_importing_the_pipeline_costs_little_more_than_jax_and_flax(bytecode, loaded):
    """At most 1.3 times the CPU time once all is compiled to bytecode, as the median ratio."""
    ratios = [float(python(COST, **bytecode)) for _ in range(3)]
    assert statistics.median(ratios) <= 1.3, ratios
