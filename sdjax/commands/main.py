"""The `sdjax` command: parses, calls, prints. What is slow to import is imported by the command that needs it."""

import gc
import itertools
import re
import sys
import warnings
from importlib.metadata import version
from typing import Annotated

import typer

from sdjax.commands.batch import batch
from sdjax.commands.compile import compile_model
from sdjax.commands.convert import convert
from sdjax.commands.environment import cache_every_program, quiet_libtpu
from sdjax.commands.generate import generate
from sdjax.commands.info import info
from sdjax.commands.options import print_warning
from sdjax.commands.plan import plan
from sdjax.commands.samplers import samplers
from sdjax.commands.serve import serve
from sdjax.commands.train import app as train
from sdjax.runtime.requirements import outdated

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

PROBLEMS_SHOWN = 5  # of each kind, of the hundreds that a checkpoint may have
LINE_LENGTH = 2000  # characters of an error


def main(args: list[str] | None = None) -> None:
    """Runs the command. What goes wrong is one line on stderr, with exit status 2."""
    if message := outdated():
        sys.exit(_fail(message))
    quiet_libtpu()
    cache_every_program()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a path that the terminal's encoding lacks is printed anyhow
    gc.disable()  # a seventh of the time of a short run; what runs long enables it
    try:
        with warnings.catch_warnings():
            warnings.showwarning = print_warning
            status = app(args, prog_name="sdjax", standalone_mode=False) or 0
    except typer.TyperException as error:
        status = _fail(error.format_message())
    except (ValueError, OSError) as error:
        status = _fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith("Unable to initialize backend"):  # the environment names a platform that is not there
            sys.exit(_fail(str(error)))
        if not _is_out_of_memory(error):
            raise
        _fail(f"out of memory: {str(error) or type(error).__name__}; make fewer or smaller pictures at once")
        status = 1
    finally:
        gc.enable()
    sys.exit(status)


def _fail(message: str) -> int:
    print(f"error: {_one_line(message)}", file=sys.stderr)
    return 2


def _is_out_of_memory(error: BaseException) -> bool:
    from sdjax.runtime.lowering import is_out_of_memory

    return is_out_of_memory(error)


def _one_line(message: str) -> str:
    """The message in one line that a person can read: of problems of one kind the first few, and how many more."""
    first, *rest = [line.strip() for line in message.strip().splitlines()] or [""]
    parts = []
    for kind, lines in itertools.groupby(rest, lambda line: line.partition(": ")[0] if ": " in line else ""):
        same = list(lines)
        parts += same[:PROBLEMS_SHOWN]
        if len(same) > PROBLEMS_SHOWN:
            parts.append(f"{kind}: … and {len(same) - PROBLEMS_SHOWN} more".removeprefix(": "))
    line = first + (" " if first.endswith(":") else "; ") + "; ".join(parts) if parts else first
    line = line if len(line) <= LINE_LENGTH else f"{line[:LINE_LENGTH]} …"
    # names in a file may hold signs that a terminal obeys
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda sign: repr(sign[0])[1:-1], line)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version("sdjax"))
        raise typer.Exit


@app.callback()
def _sdjax(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Stable Diffusion in JAX: text in, pictures out."""


for command in (generate, samplers, info, convert, batch, plan, serve):
    app.command()(command)
app.command("compile")(compile_model)
app.add_typer(train, name="train")
