"""The full-size models of a family against PyTorch, with random weights made by PyTorch.

    python scripts/check_full_size.py          Stable Diffusion 1.5: all models in float32
    python scripts/check_full_size.py sdxl     SDXL base: the UNet in bfloat16

One process makes a model, saves it and computes with it in PyTorch, another one loads and computes with sdjax. Prints
parameters, load and call times, the host memory that loading takes at its peak as a multiple of the parameters' size,
and errors; exit status 1 if one is over its limit. Needs Linux, the `test` extra, some minutes, and memory and disk in
the temporary folder: 8 and 4 GB for Stable Diffusion 1.5, 17 and 6 GB for SDXL.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import jax
import numpy as np
import torch
import transformers
from flax import nnx
from full_size import TEXT, UNET, VAE, normal
from processes import in_a_process, resident_bytes

from sdjax import models
from sdjax.models.base import Model

LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}  # of the error, as a part of max |reference|
MEMORY_LIMIT = 1.3  # of the host memory that loading takes, as a multiple of the parameters' size
LEAST_DEVIATION = 0.1  # of the reference, below which the comparison would say little

UNET_XL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@dataclass(frozen=True)
class Call:
    """One computation: by the PyTorch module and by the Flax model, both giving NHWC arrays."""

    name: str
    reference: Callable[[torch.nn.Module], torch.Tensor]
    model: Callable[[Model], jax.Array]


@dataclass(frozen=True)
class Component:
    """A model of PyTorch, its number of parameters, its class in sdjax, and what to compute with it."""

    name: str
    parameters: int
    reference: Callable[[], torch.nn.Module]
    model: type[Model]
    calls: tuple[Call, ...]
    dtype: str = "float32"


def stable_diffusion_1_5() -> list[Component]:
    """UNet at batch 2, 64x64 latents and 77 text states; VAE at 512x512; text encoder on 77 tokens."""
    sample, context, timesteps = normal(2, 64, 64, 4), normal(2, 77, 768), np.int32([981, 21])
    image, latents = np.tanh(normal(1, 512, 512, 3)), normal(1, 64, 64, 4)
    ids = np.random.default_rng(0).integers(0, 49408, (1, 77))
    unet = Call(
        "unet",
        lambda m: nhwc(m(nchw(sample), torch.tensor(timesteps), torch.tensor(context)).sample),
        lambda m: m(sample, timesteps, context),
    )
    encode = Call(
        "vae encode",
        lambda m: nhwc(m.encode(nchw(image)).latent_dist.mean),
        lambda m: m.encode(image).mean,
    )
    decode = Call("vae decode", lambda m: nhwc(m.decode(nchw(latents)).sample), lambda m: m.decode(latents))
    text = Call("text encoder", lambda m: m(torch.tensor(ids)).last_hidden_state, lambda m: m(ids))
    return [
        Component(
            "text_encoder",
            123_060_480,
            lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
            models.CLIPTextModel,
            (text,),
        ),
        Component("vae", 83_653_863, lambda: diffusers.AutoencoderKL(**VAE), models.AutoencoderKL, (encode, decode)),
        Component(
            "unet",
            859_520_964,
            lambda: diffusers.UNet2DConditionModel(**UNET),
            models.UNet2DConditionModel,
            (unet,),
        ),
    ]


def sdxl() -> list[Component]:
    """UNet at batch 1, 64x64 latents, 77 text states, pooled text, and the time ids of 512x512 pixels."""
    sample, context, timesteps = normal(1, 64, 64, 4), normal(1, 77, 2048), np.int32([981])
    pooled, ids = normal(1, 1280), np.float32([[512, 512, 0, 0, 512, 512]])
    unet = Call(
        "unet",
        lambda m: nhwc(
            m(
                nchw(sample).to(m.dtype),
                torch.tensor(timesteps),
                torch.tensor(context).to(m.dtype),
                added_cond_kwargs={"text_embeds": torch.tensor(pooled).to(m.dtype), "time_ids": torch.tensor(ids)},
            ).sample
        ),
        lambda m: m(sample, timesteps, context, pooled, ids),
    )
    return [
        Component(
            "unet",
            2_567_463_684,
            lambda: diffusers.UNet2DConditionModel(**UNET_XL),
            models.UNet2DConditionModel,
            (unet,),
            dtype="bfloat16",
        )
    ]


FAMILIES = {"sd15": stable_diffusion_1_5, "sdxl": sdxl}


def nchw(x: np.ndarray) -> torch.Tensor:
    """NHWC to contiguous NCHW."""
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def nhwc(x: torch.Tensor) -> torch.Tensor:
    """NCHW to NHWC."""
    return x.permute(0, 2, 3, 1)


def randomise(module: torch.nn.Module) -> None:
    """Values for every parameter that keep activations near 1, norms' scales and biases included."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        parameter.normal_(generator=generator)
        if parameter.ndim > 1:
            parameter /= parameter[0].numel() ** 0.5
        else:
            parameter.mul_(0.2).add_(name.endswith("weight"))


def save_reference(family: str, index: int, folder: Path) -> None:
    """PyTorch's part: saves the model, and beside it `<call>.npy` for what it computes."""
    component = FAMILIES[family]()[index]
    torch.set_grad_enabled(False)
    torch.set_default_dtype(getattr(torch, component.dtype))
    reference = component.reference().eval()
    randomise(reference)
    parameters = sum(p.numel() for p in reference.parameters())
    assert parameters == component.parameters, f"{component.name}: {parameters:,} parameters"
    reference.save_pretrained(folder)
    for call in component.calls:
        np.save(folder / f"{call.name}.npy", call.reference(reference).float().numpy())


def compare(family: str, index: int, folder: Path) -> list[dict[str, Any]]:
    """The part of sdjax: a row of results per call."""
    component = FAMILIES[family]()[index]
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.block_until_ready(jax.numpy.zeros(1))  # the backend's own memory is not that of loading
    before, start = resident_bytes("VmRSS"), time.perf_counter()
    model = jax.block_until_ready(component.model.from_pretrained(folder, dtype=component.dtype))
    load_seconds, taken = time.perf_counter() - start, resident_bytes("VmHWM") - before
    size = component.parameters * jax.numpy.dtype(component.dtype).itemsize
    return [
        {
            "parameters": component.parameters,
            "load": load_seconds,
            "memory": taken / size,
            "limit": LIMITS[component.dtype],
        }
        | compare_call(call, model, np.load(folder / f"{call.name}.npy"))
        for call in component.calls
    ]


def compare_call(call: Call, model: Model, wanted: np.ndarray) -> dict[str, Any]:
    """Name and seconds of a call, the reference's deviation, the error as a part of max |reference|."""
    graph, parameters = nnx.split(model)
    run = jax.jit(lambda parameters: call.model(nnx.merge(graph, parameters))).lower(parameters).compile()
    start = time.perf_counter()
    result = np.asarray(run(parameters), np.float32)
    return {
        "call": call.name,
        "seconds": time.perf_counter() - start,
        "deviation": wanted.std(),
        "error": np.abs(result - wanted).max() / np.abs(wanted).max(),
    }


def check(family: str) -> Iterator[dict[str, Any]]:
    """The rows of every component of a family; each part in a process of its own, one after the other."""
    for index in range(len(FAMILIES[family]())):
        with tempfile.TemporaryDirectory() as folder:
            in_a_process(save_reference, family, index, Path(folder))
            yield from in_a_process(compare, family, index, Path(folder))


def main() -> int:
    """Prints the table; 0 if all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", choices=FAMILIES, default="sd15")
    family = parser.parse_args().family
    print(
        f"{'':<14}{'parameters':>13}{'load s':>8}{'host peak / size':>18}{'call s':>8}"
        f"{'std of ref':>12}{'error / max |ref|':>19}"
    )
    failed = False
    for row in check(family):
        good = row["memory"] <= MEMORY_LIMIT and row["error"] <= row["limit"] and row["deviation"] >= LEAST_DEVIATION
        failed |= not good
        print(
            f"{row['call']:<14}{row['parameters']:>13,}{row['load']:>8.1f}{row['memory']:>18.2f}{row['seconds']:>8.1f}"
            f"{row['deviation']:>12.3f}{row['error']:>19.1e}{'' if good else '  FAILED'}",
            flush=True,
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
