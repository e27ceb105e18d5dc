"""`sdjax batch`: the command's options. What it needs is imported when it runs."""

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdjax.commands.model_options import model_options
from sdjax.commands.request_options import request_options

if TYPE_CHECKING:
    from sdjax.batch.prepare import Prepared
    from sdjax.batch.processes import Process


class Layout(StrEnum):
    files = "files"
    webdataset = "webdataset"


class ImageFormat(StrEnum):
    png = "png"
    webp = "webp"
    jpeg = "jpeg"


class Engine(StrEnum):
    local = "local"
    ray = "ray"


@request_options(sweeps=True)
@model_options
def batch(
    given: Mapping[str, Sequence[Any]],
    of_model: Mapping[str, Any],
    job: Annotated[
        str | None, typer.Argument(help="Lines of JSON, CSV or YAML; without it, the options are the job")
    ] = None,
    out: Annotated[str | None, typer.Option(help="A folder, or a URL such as s3://bucket/folder")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt on each line", show_default=False)] = None,
    format: Annotated[Layout, typer.Option(help="Pictures as files, or tar shards of the WebDataset")] = Layout.files,
    image_format: Annotated[ImageFormat, typer.Option(help="Of the pictures")] = ImageFormat.png,
    per_device: Annotated[
        int | None,
        typer.Option("--batch", help="Pictures that a device samples at once, a power of two [default: what fits]"),
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(min=1, help="The most pictures that are written together [default: 64; tar: 512]")
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Also labelled contact sheets of the sweeps")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash again what earlier runs wrote; otherwise its size is trusted")
    ] = False,
    engine: Annotated[Engine, typer.Option(help="This process, or the nodes of a Ray cluster")] = Engine.local,
    pod: Annotated[
        bool,
        typer.Option(
            "--pod",
            help="Started on each host of a Cloud TPU pod, or by Slurm or Open MPI: each makes its share of the job",
        ),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="<host:port>",
            help="As --pod, where the environment has no address: of process 0",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="With --coordinator: how many there are", show_default=False)
    ] = None,
    index: Annotated[
        int | None, typer.Option(min=0, help="With --coordinator: which this is, from 0", show_default=False)
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(
            metavar="<i/n>",
            help="This host's share of the chunks, 3/16 the third of sixteen: hosts that share a target, unconnected",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing")] = False,
    status: Annotated[
        str | None, typer.Option(metavar="<folder>", help="How far the job of a folder or URL is, and nothing else")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no summary")] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="Progress and summary as lines of JSON")] = False,
) -> None:
    """Make the pictures of a job: many prompts and seeds, on all devices.

    Interrupted by anything, the same command goes on where it was, to the same pictures. Those that are not finite are
    listed and not written, and the exit status is 1; the same command tries them again.
    """
    gc.enable()
    if status is not None:
        _print_status(status, as_json=log_json)
        return
    if out is None:
        raise ValueError("--out: give the folder or the URL that the pictures go to")
    from sdjax.batch import job as jobs
    from sdjax.batch.prepare import check_batch, prepare, words_of

    check_batch(per_device)

    last = {"seed": given["seed"]} if "seed" in given else {}  # counts fastest
    given = {name: values for name, values in given.items() if name != "seed"}
    words = words_of(of_model.get("embeddings", {}))
    items = jobs.read(job, {**given, **last}, prompts=prompts, words=words.values())
    options = {**of_model, "format": format.value, "image_format": image_format.value}
    if dry_run:
        _print_plan(prepare(items, out, **options), per_device, chunk_size, as_json=log_json)
        return
    options |= {"batch": per_device, "chunk_size": chunk_size, "grid": grid, "verify": verify, "engine": engine.value}
    with _process(share, pod, coordinator, processes, index) as process:
        _run(items, out, quiet=quiet, as_json=log_json, process=process, **options)


def _process(share: str | None, pod: bool, *known: str | int | None) -> "AbstractContextManager[Process]":
    from sdjax.batch import processes
    from sdjax.batch.processes import ALONE, join

    if share is not None:
        if pod or known != (None, None, None):
            raise ValueError("--share: the hosts do not meet; leave out --pod and --coordinator")
        return nullcontext(processes.share(share))
    return join(*known) if pod or known != (None, None, None) else nullcontext(ALONE)


def _run(items: Any, out: str, *, quiet: bool, as_json: bool, **options: Any) -> None:
    from dataclasses import asdict

    from sdjax.batch import report
    from sdjax.batch.interruption import Interrupted, UnfinishedError
    from sdjax.batch.runner import run

    shown = nullcontext(report.log_json) if as_json else nullcontext() if quiet else report.live()
    try:
        with shown as on_progress:
            done = run(items, out, on_progress=on_progress, **options)
    except UnfinishedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except Interrupted as error:
        print(error, file=sys.stderr, flush=True)
        if error.is_busy:
            sys.stdout.flush()
            os._exit(128 + error.signum)  # a device or a compiler is not waited for
        raise SystemExit(128 + error.signum) from None
    if as_json:
        report.json_line("summary", **asdict(done))
    elif not quiet:
        print(report.summary(done))
    if done.failed:
        print(f"error: {report.failures(done)}", file=sys.stderr)
        raise typer.Exit(1)


def _print_plan(ready: "Prepared", batch: int | None, chunk_size: int | None, *, as_json: bool) -> None:
    from dataclasses import asdict

    from sdjax.batch import record, report
    from sdjax.batch.memory import picture_size
    from sdjax.batch.plan import estimate
    from sdjax.batch.prepare import lay_out
    from sdjax.batch.timing import rate

    output = ready.output
    known = record.read(output.target)
    plan = lay_out(ready, known, batch, chunk_size)
    if known is not None:
        record.Record.of(plan, output, ready.shared["model"]).check(known, output.target.url)
    there = len(output.committed() & {*plan.ids})
    found = estimate(plan, output.format, rate(ready, plan), partial(picture_size, ready.pipe))
    devices = ready.pipe.mesh.size
    if as_json:
        report.json_line("plan", **asdict(found), batch=plan.batch, devices=devices, chunks_done=there)
    else:
        print(report.plan(found, plan.batch, devices, output.target.url, there))


def _print_status(out: str, *, as_json: bool) -> None:
    from dataclasses import asdict

    from sdjax.batch import report
    from sdjax.request.values import text

    found = report.status(text("--status", out))
    if as_json:
        report.json_line("status", **asdict(found))
    else:
        print(report.status_text(found))
