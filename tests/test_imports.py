"""Imports point one way, and `import sdjax` is light."""

import ast
import os
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
# whatever is inside the first must not import, even within a function, anything inside the others
FORBIDDEN = {
    "sdjax": PYTORCH,
    "sdjax.schedule": ("jax", "flax", "sdjax"),
    "sdjax.samplers": ("jax", "flax", "sdjax.models", "sdjax.checkpoints", "sdjax.denoise", "sdjax.pipeline"),
    "sdjax.checkpoints": ("sdjax.models", "sdjax.samplers", "sdjax.denoise", "sdjax.pipeline", "sdjax.cli"),
    "sdjax.models": ("sdjax.samplers", "sdjax.denoise", "sdjax.parallel", "sdjax.pipeline", "sdjax.cli"),
    "sdjax.denoise": ("sdjax.models", "sdjax.checkpoints", "sdjax.pipeline", "sdjax.cli", "sdjax.training"),
    "sdjax.parallel": ("sdjax.models", "sdjax.checkpoints", "sdjax.pipeline", "sdjax.cli", "sdjax.training"),
    "sdjax.noise": ("jax", "flax", "sdjax"),
    "sdjax.prompts": ("sdjax.models", "sdjax.checkpoints.single_file", "sdjax.pipeline", "sdjax.cli"),
    "sdjax.conditioning": ("sdjax.components", "sdjax.programs", "sdjax.pipeline", "sdjax.cli"),
    "sdjax.loras": ("sdjax.models", "sdjax.components", "sdjax.pipeline", "sdjax.cli"),
    "sdjax.components": ("sdjax.programs", "sdjax.diffusion_pipeline", "sdjax.pipeline", "sdjax.cli", "sdjax.batch"),
    "sdjax.diffusion_pipeline": ("sdjax.pipeline", "sdjax.cli", "sdjax.batch", "sdjax.training"),
    "sdjax.ahead": ("sdjax.models", "sdjax.programs", "sdjax.pipeline", "sdjax.cli"),
    "sdjax.lowering": ("sdjax.models", "sdjax.pipeline", "sdjax.batch", "sdjax.plan", "sdjax.cli"),
    "sdjax.plan": ("sdjax.batch", "sdjax.cli", "sdjax.training"),
    "sdjax.tiling": ("sdjax",),
    "sdjax.pipeline": ("sdjax.cli", "sdjax.batch", "sdjax.training"),
    "sdjax.batch": ("sdjax.cli", "sdjax.training"),
    "sdjax.ops": ("flax", "sdjax"),
    "sdjax.models.layers": ("sdjax.models", "sdjax.checkpoints"),
    "sdjax.models.attention": ("sdjax.checkpoints", "sdjax.models.clip", "sdjax.models.unet", "sdjax.models.vae"),
    "sdjax.models.base": ("sdjax.models.clip", "sdjax.models.unet", "sdjax.models.vae"),
}
OPTIONAL = ("pyarrow", "webdataset", "ray", "emoji")
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
    assert {"sdjax", "sdjax.models.unet", "sdjax.checkpoints.folder", "sdjax.schedule"} <= MODULES.keys()
    assert "sdjax.checkpoints.folder" in imported(MODULES["sdjax.models.base"])


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows(package):
    sources = {name: path for name, path in MODULES.items() if within(name, package)}
    assert sources
    wrong = [
        f"{name} imports {target}"
        for name, path in sources.items()
        for target in imported(path)
        if any(within(target, other) for other in FORBIDDEN[package]) and not within(target, package)
    ]
    assert not wrong


def test_only_checkpoints_opens_weights_or_asks_the_hub():
    users = {name for name, path in MODULES.items() for target in imported(path) if target.startswith(OPENS_WEIGHTS)}
    assert users
    assert all(within(name, "sdjax.checkpoints") for name in users)


def test_only_the_command_imports_batch():
    users = {name for name, path in MODULES.items() for target in imported(path) if within(target, "sdjax.batch")}
    assert {name for name in users if not within(name, "sdjax.batch")} == {"sdjax.cli"}


def python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    environ = {**os.environ, **environment}
    return subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["sdjax", "sdjax.cli", "sdjax.pipeline"])
def test_an_import_loads_nothing_of_pytorch(module):
    loaded = python(f"import sys, {module}; print(*sys.modules)").split()
    assert module in loaded
    assert not {*PYTORCH} & {*loaded}


def test_the_commands_help_needs_no_jax():
    assert "jax" not in python("import sys, sdjax.cli; print(*sys.modules)").split()


def test_what_is_optional_is_imported_when_it_is_used():
    loaded = python("import sys, sdjax.batch.runner; print(*sys.modules)").split()
    assert "sdjax.batch.output" in loaded
    assert not {*OPTIONAL} & {*loaded}


def seconds(code: str, **environment: str) -> float:
    """CPU time of a Python process: what runs beside it does not count."""
    before = os.times()
    python(code, **environment)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize(("ours", "theirs"), [("sdjax", "jax, flax"), ("sdjax.pipeline", "jax, flax.nnx")])
def test_importing_costs_little_more_than_jax_and_flax(ours, theirs, tmp_path):
    """At most 1.3 times the CPU time once all is compiled to bytecode, as the median ratio of runs in turn."""
    bytecode = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    python(f"import {theirs}, {ours}", **bytecode)
    ratios = [seconds(f"import {ours}", **bytecode) / seconds(f"import {theirs}", **bytecode) for _ in range(5)]
    assert statistics.median(ratios) <= 1.3, ratios
