"""Memory of a training step by the TPU compiler's count, without a TPU: a LoRA or a whole UNet of a published model.

    python scripts/bench/training_memory.py sd15 lora --topology v5e:1x1
    python scripts/bench/training_memory.py sdxl full --topology v5e:2x4 --fsdp 8 --batch 8 --optimizer adafactor

Text states and the VAE's moments are cached, networks are in bfloat16 with float32 masters, blocks are computed again
in the backward pass. Needs the `plan` extra and minutes: an hour of one core for SDXL.
"""

import argparse
import os
import time
from types import SimpleNamespace
from typing import Any

from sdjax.plan import targets

GiB = 2**30


def pipeline(model: str) -> SimpleNamespace:
    """The models that a step takes, with shapes in place of weights."""
    from sdjax import sampling
    from sdjax.plan.configs import PUBLISHED
    from sdjax.plan.described import Described

    known = {"text_encoder": None, "text_encoder_2": None, "scheduler": sampling.from_config("ddpm")}
    return SimpleNamespace(**known | Described(PUBLISHED[model]).models)


def batch(pipe: SimpleNamespace, images: int, size: int) -> dict[str, Any]:
    """The shapes of a batch of square pictures."""
    import jax
    import jax.numpy as jnp

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((images, *shape), jnp.float32)

    side, unet = size // pipe.vae.config.factor, pipe.unet.config
    given = {"moments": array(side, side, 8), "text": {"hidden": array(77, unet.cross_attention_dim)}}
    if unet.addition_embed_type:
        given["text"]["pooled"] = array(pipe.text_encoder_2.config.pooled_width)
        given["time_ids"] = array(6)
    return given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["sd15", "sd21", "sdxl"])
    parser.add_argument("kind", choices=["lora", "full"])
    parser.add_argument("--topology", default="v5e:1x1")
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--batch", type=int, help="default: one picture a device")
    parser.add_argument("--size", type=int, help="default: the model's")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--ema", action="store_true")
    args = parser.parse_args()
    os.environ.update(targets.ENVIRONMENT)

    import jax

    from sdjax.training import lora, optimizers, whole
    from sdjax.training.objective import Objective
    from sdjax.training.trainer import Trainer, training_mesh

    pipe, chip = pipeline(args.model), targets.parse_topology(args.topology)
    mesh = training_mesh(targets.devices(*chip), args.fsdp)
    options = {"texts_cached": True, "gradient_checkpointing": True}
    if args.kind == "lora":
        trained = lora.begin(pipe, lora.Lora(rank=args.rank), jax.random.key(0), **options)
    else:
        trained = whole.begin(pipe, **options)
    optimizer, ema = optimizers.create(args.optimizer, 1e-4), 0.9999 if args.ema else None
    trainer = Trainer(trained, Objective.of(pipe.scheduler), optimizer, mesh=mesh, ema=ema)
    size = args.size or pipe.unet.config.sample_size * pipe.vae.config.factor
    began = time.monotonic()
    memory = trainer.lower(batch(pipe, args.batch or mesh.size, size)).compile().memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(f"on each of {mesh.size} {args.topology}, of {targets.CHIPS[chip[0]].hbm / GiB:.2f} GiB:")
    print(
        f"parameters, optimiser and batch {kept / GiB:.2f} GiB, beside them {memory.temp_size_in_bytes / GiB:.2f} GiB"
    )
    print(f"compiled in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
