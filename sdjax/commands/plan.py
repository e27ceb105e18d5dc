"""`sdjax plan`: the command's options. What it needs is imported when it runs."""

import os
import sys
from typing import Annotated

import typer

from sdjax.commands.options import parse_pair
from sdjax.plan import targets
from sdjax.request.values import MAX_PICTURES


def plan(
    topology: Annotated[
        str, typer.Option(help=f"CHIP:SHAPE, such as v5e:2x4; chips are {', '.join(targets.CHIPS)}")
    ] = "v5e:1x1",
    model: Annotated[
        str, typer.Option(help="sd15, sd21, sdxl, a diffusers folder or a Hub id: no weights are read")
    ] = "sd15",
    controlnet: Annotated[
        list[str] | None, typer.Option(help="A ControlNet: a folder or a Hub id; repeatable", show_default=False)
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="A T2I-Adapter: a folder or a Hub id; repeatable", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=MAX_PICTURES, help="Pictures that each device samples at once")] = 1,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT [default: the model's]", show_default=False)] = None,
    largest_batch: Annotated[
        bool, typer.Option("--largest-batch", help="Find the largest that fits, by compiling two or more batches")
    ] = False,
) -> None:
    """Count what the pipeline's programs take on TPUs: memory, operations, the least time.

    The compiler of TPUs compiles them here: no TPU is needed, and none is used. Full-size models take minutes.
    """
    chip, shape = targets.parse_topology(topology)
    wanted = parse_pair("--size", size)
    targets.check_compiler()
    os.environ.update(targets.ENVIRONMENT)

    from sdjax.plan import configs, counts
    from sdjax.plan.described import Described
    from sdjax.plan.report import STEPS, Plan, lines
    from sdjax.runtime import bounds, compiler_memory
    from sdjax.runtime.parallel import data_mesh

    compiler_memory.enable()
    described = Described(configs.read(model, controlnet or (), adapter or ()))
    width, height = wanted or described.size
    mesh = data_mesh(targets.devices(chip, shape))

    def planned(batch: int) -> Plan:
        bounds.check_against(targets.CHIPS[chip].hbm, described.models, bounds.Load(batch, height, width))
        found = []
        for program in described.lower(mesh, batch, width, height):
            print(f"batch {batch}: compiling {program.name} …", file=sys.stderr, flush=True)
            found.append(counts.count(program))
        runs = {"encode": described.sides, "denoise": STEPS, "decode": counts.decodings(batch, width * height)}
        return Plan(targets.CHIPS[chip], batch, described.parameter_bytes(), found, runs)

    asked_for = planned(batch)
    print(f"{model}, {width}x{height}, batch {batch} on each of {mesh.size} {chip}, bfloat16")
    print(*lines(asked_for), sep="\n", flush=True)

    def fits(batch: int) -> bool:
        try:
            return (asked_for if batch == asked_for.batch else planned(batch)).fits
        except counts.DoesNotFit:
            return False

    estimate = asked_for.estimated_batch
    if largest_batch:
        print(f"largest      batch {counts.largest_batch(fits, max(1, estimate))} on each device, of powers of two")
    else:
        print(f"largest      batch {estimate} on each device, estimated from this one; --largest-batch compiles others")
