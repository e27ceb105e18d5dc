"""The memory of a gradient through the sampler, by the number of steps: `python scripts/bench/gradients.py`.

The embedded model, one picture of 128x128 with guidance: bytes of intermediate values by XLA's own account of the
compiled gradient of mean(latents^2) by the guidance scale and the table; first of a scan without `jax.checkpoint`, then
as `sampling.loop.denoise` has it.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

import sdjax
from sdjax.sampling import Table, loop
from sdjax.sampling.guidance import branched, text_weights, weighted


def denoise_keeping(f: loop.Model, table: Table, x: Array, noise: Array, guide: loop.Guide) -> Array:
    """`loop.denoise` whose gradient keeps all that was computed."""
    rows = loop.rows(table, len(x))
    return jax.lax.scan(lambda state, row: (loop.step(f, state, row, noise, guide)[0], None), loop.start(x), rows)[0].x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 40])
    args = parser.parse_args()
    pipe = sdjax.StableDiffusionPipeline.from_pretrained()
    graph, params = pipe.network("unet")
    states = pipe.text_encoder(pipe.tokenizer(["", "a goose"]))[:, None]
    side = pipe.unet.config.sample_size
    x = jax.random.normal(jax.random.key(0), (1, side, side, pipe.unet.config.in_channels))

    def loss(scale: Array, table: Table, params: dict, *, with_checkpoint: bool) -> Array:
        f = branched(lambda x, t, states: graph.merge(params)(x, t, states), list(states))
        guide, noise = weighted(text_weights(scale)), jnp.zeros_like(x)
        if with_checkpoint:
            return (loop.denoise(f, table, x, lambda draw: noise, guide) ** 2).mean()
        return (denoise_keeping(f, table, x, noise, guide) ** 2).mean()

    for steps in args.steps:
        row = [steps]
        for with_checkpoint in (False, True):
            gradient = jax.grad(partial(loss, with_checkpoint=with_checkpoint), argnums=(0, 1), allow_int=True)
            compiled = jax.jit(gradient).lower(jnp.full(1, 3.0), pipe.scheduler.table(steps), params).compile()
            row.append(f"{compiled.memory_analysis().temp_size_in_bytes / 2**20:.1f}")
        print(*row, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
