"""Learns the table of a sampler of few steps: `python scripts/emoji/learn_table.py --drawings drawings.npz --steps 6`.

The model stays as it is. From DPM++ 2M's table for so many steps on, gradients through the whole run move the noise
levels, the timesteps that the model is told, and the weights of the last four estimates of the clean latents, until the
run ends where 50 steps from the same noise do: the mean over pictures of the logarithm of the squared error of latents
is minimised by Adam. As in arXiv:2202.05830 (gradients through the sampler with rematerialisation) and arXiv:2403.01329
(a linear solver of its own for each step), but for the loss.

Then, for 100 prompts of pairings of name and background that training of the model left out, and seeds that were not
learned from: the PSNR of the pictures against those of 50 steps, and how many are recognised (`retrieval.Gallery`).
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from drawings import Drawings
from jax import Array
from retrieval import FIRST_SEED, Gallery, asked_for

import sdjax
from sdjax.runtime.parallel import data_mesh
from sdjax.sampling import Table
from sdjax.sampling.noise import seed_keys
from sdjax.sampling.table import m0, m1, m2, m3, x
from sdjax.training import losses

MANY = 50
TIMESTEPS = 100  # that a unit of `Change.t` stands for
CALL = 20  # pictures at once in evaluation


class Change(NamedTuple):
    """What is learned of a table of R rows."""

    level: Array
    """[R - 1] added to the logarithm of the noise level of each row but the first"""
    t: Array
    """[R] added to the timestep of each row's level, in TIMESTEPS"""
    weights: Array
    """[R 4] added to the weights of the last four estimates of the clean latents"""

    @classmethod
    def none(cls, rows: int) -> "Change":
        return cls(jnp.zeros(rows - 1), jnp.zeros(rows), jnp.zeros((rows, 4)))


def changed(table: Table, schedule_levels: np.ndarray, change: Change) -> Table:
    """x' = s'/s a'/a x + a' (1 - s'/s) sum_k w_k m_k, with s the noise level, a^2 = 1 / (1 + s^2), m the estimates.

    Of a model that predicts v; of a table like DPM++ 2M's, which has this form, and ends at level 0.
    """
    s = table.marginals[:, 1] / table.marginals[:, 0]
    alpha = table.marginals[:, 0]
    share = alpha[1:] * (1 - s[1:] / s[:-1])
    weights = table.mix[:, 0] @ np.stack([m0, m1, m2, m3], axis=1) / share[:, None] + change.weights
    s = jnp.concatenate([s[:1], s[1:-1] * jnp.exp(change.level), s[-1:]])
    alpha = 1 / jnp.hypot(1, s)
    sigma, ratio = s * alpha, s[1:] / s[:-1]
    of_m = (alpha[1:] * (1 - ratio))[:, None] * weights
    new_x = (ratio * alpha[1:] / alpha[:-1])[:, None] * x + of_m @ np.stack([m0, m1, m2, m3])
    t = jnp.interp(jnp.log(s[:-1]), np.log(schedule_levels), np.arange(len(schedule_levels)))
    return replace(
        table,
        t=t + TIMESTEPS * change.t,
        skip=alpha[:-1],
        out=-sigma[:-1],
        mix=jnp.stack([new_x, table.mix[:, 1]], axis=1),
        marginals=jnp.stack([alpha, sigma], axis=1),
    )


class Runs(NamedTuple):
    """What pictures are made of, and the latents that 50 steps make."""

    tokens: np.ndarray
    keys: np.ndarray
    scale: np.ndarray
    latents: np.ndarray

    def batches(self, size: int) -> Iterator["Runs"]:
        for first in range(0, len(self.keys), size):
            yield Runs(*(column[first : first + size] for column in self))


class Sampler:
    """The latents that tables make."""

    def __init__(self, pipe: sdjax.StableDiffusionPipeline):
        self.pipe, size = pipe, pipe.vae.config.sample_size
        self.pure = pipe.text_to_latents(size, size)
        self._run = jax.jit(self.pure)
        self._decode = jax.jit(lambda z: pipe.vae.decode(z / pipe.vae.config.scaling_factor).clip(-1, 1))

    def runs(self, prompts: list[str], seed: int, guidance: float) -> Runs:
        tokens = np.stack([self.pipe.tokenizer(["", prompt]) for prompt in prompts])
        keys, scale = seed_keys(range(seed, seed + len(prompts))), np.full(len(prompts), guidance, np.float32)
        runs = Runs(tokens, keys, scale, np.zeros(len(prompts)))
        return runs._replace(latents=self.latents(runs, self.pipe.scheduler.table(MANY)))

    def latents(self, runs: Runs, table: Table) -> np.ndarray:
        made = [self._run(self.pipe.params, *batch[:2], table, batch.scale) for batch in runs.batches(CALL)]
        return np.concatenate(made)

    def pictures(self, latents: np.ndarray) -> np.ndarray:
        """[B H W 3] in 0 to 1"""
        return np.concatenate([self._decode(latents[i : i + CALL]) for i in range(0, len(latents), CALL)]) / 2 + 0.5


def learn(sampler: Sampler, runs: Runs, steps: int, updates: int, batch: int, rate: float) -> Table:
    """The table of `steps` rows, learned from batches drawn from the runs."""
    scheduler = sampler.pipe.scheduler
    table, levels = scheduler.table(steps), scheduler.schedule.levels
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, updates), b2=0.99)

    def loss(change: Change, params: dict, runs: Runs) -> Array:
        made = sampler.pure(params, *runs[:2], changed(table, levels, change), runs.scale)
        return jnp.log(((made - runs.latents) ** 2).mean(axis=(1, 2, 3))).mean()

    @jax.jit
    def update(change: Change, state: optax.OptState, params: dict, runs: Runs) -> tuple[Change, optax.OptState, Array]:
        value, gradient = jax.value_and_grad(loss)(change, params, runs)
        move, state = optimizer.update(gradient, state)
        return optax.apply_updates(change, move), state, value

    change, rng, began = Change.none(steps), np.random.default_rng(0), time.perf_counter()
    state, values = optimizer.init(change), []
    for i in range(updates):
        taken = rng.choice(len(runs.keys), batch, replace=False)
        change, state, value = update(change, state, sampler.pipe.params, Runs(*(column[taken] for column in runs)))
        values.append(10 * float(value) / np.log(10))
        if (i + 1) % 20 == 0:
            error = np.mean(values[-20:])
            print(f"update {i + 1}, {time.perf_counter() - began:.0f} s: error {error:.2f} dB", flush=True)
    learned = changed(table, levels, change)
    return replace(learned, **{name: np.asarray(column, np.float64) for name, column in _learned(learned).items()})


def _learned(table: Table) -> dict[str, Array]:
    return {name: getattr(table, name) for name in ("t", "skip", "out", "mix", "marginals")}


def save(path: Path, table: Table) -> None:
    np.savez_compressed(path, **{name: column for name, column in asdict(table).items() if column is not None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawings", type=Path, default=Path("train_emoji/drawings.npz"), help="the prepared data")
    parser.add_argument("--steps", type=int, nargs="+", default=[6])
    parser.add_argument("--guidance", type=float, default=3)
    parser.add_argument("--runs", type=int, default=64, help="pictures to learn from")
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--held-out", type=int, default=100, help="pictures to measure by")
    parser.add_argument("--out", type=Path, default=Path("train_emoji"), help="the folder of table-<steps>.npz")
    args = parser.parse_args()

    drawings = Drawings.load(args.drawings)
    sampler = Sampler(sdjax.StableDiffusionPipeline.from_pretrained(mesh=data_mesh(jax.devices()[:1])))
    learned_from = sampler.runs(asked_for(drawings.names, args.runs).prompts, 0, args.guidance)
    asked = asked_for(drawings.names, args.held_out, held_out=True)
    measured = sampler.runs(asked.prompts, FIRST_SEED, args.guidance)
    gallery, exact = Gallery(drawings), sampler.pictures(measured.latents)

    def report(label: str, latents: np.ndarray) -> None:
        pictures = sampler.pictures(latents)
        error = 10 * np.log10(((latents - measured.latents) ** 2).mean(axis=(1, 2, 3))).mean()
        psnr = float(losses.psnr(jnp.asarray(2 * pictures - 1), 2 * exact - 1))
        scores = "   ".join(f"{name} {share:.1%}" for name, share in gallery.scores(pictures, asked).items())
        print(f"{label}: {psnr:.2f} dB, latents {error:.2f} dB   {scores}", flush=True)

    with np.errstate(divide="ignore"):
        report(f"{MANY} steps", measured.latents)
    for steps in args.steps:
        report(f"{steps} steps, DPM++ 2M", sampler.latents(measured, sampler.pipe.scheduler.table(steps)))
        table = learn(sampler, learned_from, steps, args.updates, args.batch, args.rate)
        report(f"{steps} steps, learned", sampler.latents(measured, table))
        save(args.out / f"table-{steps}.npz", table)


if __name__ == "__main__":
    main()
