"""Runs the notebooks in colab/ in the kernel of this Python, offline, on the CPU: a line for each, with its seconds.

    python scripts/run_notebooks.py [NOTEBOOK ...] [--html DIR]

They run with the embedded model, each in an empty folder of its own. Where one fails, its cell and the error are
printed, and the exit status is 1. Needs nbclient and ipykernel; for --html, which writes what the notebooks look like
then, nbconvert.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds of a cell
MAPPED = ("how_stable_diffusion_works", "many_seeds")  # over devices, which are virtual here
DEVICES = 8
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default"}


class Kernel(AsyncKernelManager):
    """That of this Python, whatever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        )


def run(path: Path, folder: str) -> nbformat.NotebookNode:
    """The notebook with its outputs. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    flags = f"--xla_force_host_platform_device_count={DEVICES if path.stem in MAPPED else 1}"
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **ENVIRONMENT, "XLA_FLAGS": flags, "PYTHONPATH": paths}
    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_manager_class=Kernel, resources={"metadata": {"path": folder}}
    )
    client.execute(env=environment)
    return notebook


def write_html(notebook: nbformat.NotebookNode, path: Path) -> None:
    from nbconvert import HTMLExporter

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="[default: all of colab/]")
    parser.add_argument("--html", type=Path, metavar="DIR", help="where to write them as HTML, with their outputs")
    given = parser.parse_args()
    failed = 0
    for path in given.notebooks or sorted((ROOT / "colab").glob("*.ipynb")):
        begun, said = time.perf_counter(), "failed"
        with tempfile.TemporaryDirectory() as folder:
            try:
                notebook, said = run(path, folder), "passed"
            except CellExecutionError as error:
                failed += 1
                print(error, file=sys.stderr)
            else:
                if given.html:
                    write_html(notebook, given.html / f"{path.stem}.html")
        print(f"{path.stem}: {said} in {time.perf_counter() - begun:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
