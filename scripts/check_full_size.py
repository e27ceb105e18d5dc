"""The full-size models of Stable Diffusion 1.5 against PyTorch, with random weights made by PyTorch.

    python scripts/check_full_size.py

Prints parameters, load and call times and errors; exit status 1 if an error is over the limit. Needs the `test` extra,
10 GB of memory, 4 GB of disk in the temporary folder, and some minutes.
"""

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import jax
import numpy as np
import torch
import transformers
from flax import nnx

from sdjax import models
from sdjax.models.base import Model

LIMIT = 1e-4  # of max |reference|
LEAST_DEVIATION = 0.1  # of the reference, below which the comparison would say little

UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}


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


def components() -> list[Component]:
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


def normal(*shape: int) -> np.ndarray:
    """The same standard normal float32 values every time."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


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


def check(component: Component) -> Iterator[dict[str, Any]]:
    """A row of results per call."""
    reference = component.reference().eval()
    randomise(reference)
    parameters = sum(p.numel() for p in reference.parameters())
    assert parameters == component.parameters, f"{component.name}: {parameters:,} parameters"
    expected = [call.reference(reference).numpy() for call in component.calls]
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        del reference
        gc.collect()
        start = time.perf_counter()
        model = jax.block_until_ready(component.model.from_pretrained(folder, dtype=np.float32))
        load_seconds = time.perf_counter() - start
    for call, wanted in zip(component.calls, expected, strict=True):
        run = nnx.jit(call.model).lower(model).compile()
        start = time.perf_counter()
        result = np.asarray(run(model))
        yield {
            "call": call.name,
            "parameters": f"{parameters:,}",
            "load s": f"{load_seconds:.1f}",
            "call s": f"{time.perf_counter() - start:.1f}",
            "deviation": wanted.std(),
            "error": np.abs(result - wanted).max() / np.abs(wanted).max(),
        }


def main() -> int:
    """Prints the table; 0 if all is well."""
    jax.config.update("jax_default_matmul_precision", "highest")
    torch.set_grad_enabled(False)
    print(f"{'':<14}{'parameters':>13}{'load s':>8}{'call s':>8}{'std of ref':>12}{'error / max |ref|':>19}")
    failed = False
    for component in components():
        for row in check(component):
            good = row["error"] <= LIMIT and row["deviation"] >= LEAST_DEVIATION
            failed |= not good
            print(
                f"{row['call']:<14}{row['parameters']:>13}{row['load s']:>8}{row['call s']:>8}"
                f"{row['deviation']:>12.3f}{row['error']:>19.1e}{'' if good else '  FAILED'}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
