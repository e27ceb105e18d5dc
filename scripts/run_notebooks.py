"""Runs the notebooks in colab/ in the kernel of this Python, offline, on the CPU: a line for each, with its seconds.

    python scripts/run_notebooks.py [NOTEBOOK ...] [--html DIR]

They run with the embedded model, each in an empty folder. Where one fails, its cell and the error are printed, and the
exit status is 1. Needs nbclient and ipykernel; for --html, which writes what the notebooks then look like, nbconvert.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds of a cell
MAPPED = ("how_stable_diffusion_works", "many_seeds")  # over devices, which are virtual here
DEVICES = 8
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
FAILURES = (CellControlSignal, DeadKernelError)  # of which the first is what errors and timeouts of cells are


class Kernel(AsyncKernelManager):
    """That of this Python, whatever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        quiet = "--log-level=ERROR"  # it warns of its sockets
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", quiet])


def run(notebook: nbformat.NotebookNode, devices: int) -> None:
    """Fills in the outputs. Raises one of FAILURES."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **ENVIRONMENT, "XLA_FLAGS": flags, "PYTHONPATH": paths}
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=TIMEOUT, kernel_manager_class=Kernel, resources=resources)
        client.execute(env=environment)


def described(notebook: nbformat.NotebookNode, error: Exception) -> str:
    """The last cell that ran, and what went wrong."""
    ran = [cell.source for cell in notebook.cells if cell.cell_type == "code" and cell.execution_count]
    if isinstance(error, CellExecutionError):
        return f"{ran[-1]}\n\n{error.ename}: {error.evalue}"
    return f"{ran[-1] if ran else ''}\n\n{type(error).__name__}: {error}"


def write_html(notebook: nbformat.NotebookNode, path: Path) -> None:
    from nbconvert import HTMLExporter

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="[default: all of colab/]")
    parser.add_argument("--html", type=Path, metavar="DIR", help="where to write them as HTML, with their outputs")
    given = parser.parse_args()
    paths = given.notebooks or (ROOT / "colab").glob("*.ipynb")
    longest_first = sorted(paths, key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        passed = list(threads.map(partial(passes, html=given.html), longest_first))
    return int(not all(passed))


def passes(path: Path, html: Path | None) -> bool:
    """Runs a notebook, and says how that went."""
    begun, said, notebook = time.perf_counter(), "passed", nbformat.read(path, as_version=4)
    try:
        run(notebook, DEVICES if path.stem in MAPPED else 1)
    except FAILURES as error:
        said = "failed"
        print(described(notebook, error), file=sys.stderr)
    print(f"{path.stem}: {said} in {time.perf_counter() - begun:.0f} s", flush=True)
    if html:
        write_html(notebook, html / f"{path.stem}.html")
    return said == "passed"


if __name__ == "__main__":
    sys.exit(main())
