"""The pictures of a group that the devices compute at once, each at a row of its own table."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from PIL import Image

from sdjax import inputs
from sdjax.engine.groups import Group
from sdjax.engine.job import Job
from sdjax.engine.sampled import in_uint8
from sdjax.inputs import Inputs
from sdjax.runtime import programs
from sdjax.runtime.ahead import Program
from sdjax.runtime.denoiser import Control, composed
from sdjax.runtime.parallel import DATA, shard_map
from sdjax.runtime.programs import SEGMENT_ROWS, Original
from sdjax.sampling import Table
from sdjax.sampling.loop import Known, State, host_columns
from sdjax.text.conditioning import Condition

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline, StableDiffusionPipelineOutput


class Held(NamedTuple):
    """What the devices have of the pictures under way, images first; see `Inputs`, from which it is made."""

    state: State
    denoised: Array
    """[B h w C] the last estimate of the clean sample"""
    keys: Array
    branches: tuple[Condition, ...]
    guidance: tuple[Array | None, ...]
    known: Known | None
    channels: Array | None
    control: Control | None
    original: Original | None

    @property
    def form(self) -> tuple:
        """What must be equal for pictures to be beside each other."""
        leaves, tree = jax.tree.flatten(self)
        return tree, tuple((leaf.shape[1:], leaf.dtype) for leaf in leaves)


def _power_of_two(n: int) -> int:
    """The least that is not smaller."""
    return 1 << (n - 1).bit_length()


@partial(Program, static=(0,))
def arranged(mesh: Mesh, sources: tuple[Any, ...], source: np.ndarray, place: np.ndarray) -> Any:
    """Each device's images of one or two trees [B ...], of these sources [B'], at these places [B'] of its share."""

    def run(sources: tuple[Any, ...], source: Array, place: Array) -> Any:
        def pick(*leaves: Array) -> Array:
            taken = [jnp.take(leaf, place, axis=0, mode="clip") for leaf in leaves]
            chosen = source.reshape(-1, *[1] * (leaves[0].ndim - 1))
            return taken[0] if len(taken) == 1 else jnp.where(chosen == 0, *taken)

        return jax.tree.map(pick, *sources)

    return shard_map(run, mesh, (DATA, DATA, DATA), DATA)(sources, source, place)


class Slots:
    """The places for pictures of one group, equally many on each device: a power of two, as few as hold them."""

    def __init__(self, pipe: "StableDiffusionPipeline", group: Group):
        self.pipe, self.group = pipe, group
        self._held: Held | None = None
        self._places: list[list[Job | None]] = [[] for _ in range(pipe.mesh.size)]

    @property
    def jobs(self) -> list[Job]:
        """Those whose pictures are under way, or done and not taken."""
        return [job for own in self._places for job in own if job is not None]

    @property
    def width(self) -> int:
        """The places on each device."""
        return len(self._places[0])

    def admit(self, jobs: Sequence[Job]) -> list[Job]:
        """Begins with these; returns those whose arrays have another form than those that are under way.

        Raises ValueError where a request cannot be prepared.
        """
        counts = [sum(job is not None for job in own) for own in self._places]
        added: list[list[Job]] = [[] for _ in counts]
        for job in jobs:
            device = min(range(len(counts)), key=counts.__getitem__)
            counts[device] += 1
            added[device].append(job)
        most = _power_of_two(max(map(len, added)))
        rows = [(own + own[-1:] * most)[:most] if own else [jobs[0]] * most for own in added]
        prepared = inputs.prepare(self.pipe, [job.request for own in rows for job in own])
        new = _held(self.pipe.mesh, prepared)
        if self._held is not None and new.form != self._held.form:
            return list(jobs)
        for i, job in enumerate(job for own in rows for job in own):
            job.columns = _columns(prepared, i, job.rows)
        self._arrange(added, new)
        return []

    def drop(self, jobs: Sequence[Job]) -> None:
        """Frees the places of these."""
        gone = set(map(id, jobs))
        self._places = [[None if id(job) in gone else job for job in own] for own in self._places]

    def narrow(self) -> None:
        """Leaves out places that are not needed."""
        needed = max(sum(job is not None for job in own) for own in self._places)
        if not needed:
            self._held, self._places = None, [[] for _ in self._places]
        elif _power_of_two(needed) < self.width:
            self._arrange([[] for _ in self._places], None)

    def _arrange(self, added: Sequence[list[Job]], new: Held | None) -> None:
        kept = [[(0, i, job) for i, job in enumerate(own) if job is not None] for own in self._places]
        wanted = [own + [(1, i, job) for i, job in enumerate(more)] for own, more in zip(kept, added, strict=True)]
        width = _power_of_two(max(map(len, wanted)))
        sources = [held for held in (self._held, new) if held is not None]
        filler = (0 if self._held is not None else 1, 0, None)
        wanted = [(own + [filler] * width)[:width] for own in wanted]
        flat = [place for own in wanted for place in own]
        source = np.int32([place[0] for place in flat]) if len(sources) == 2 else np.zeros(len(flat), np.int32)
        self._held = arranged(self.pipe.mesh, tuple(sources), source, np.int32([place[1] for place in flat]))
        self._places = [[job for _, _, job in own] for own in wanted]

    def run(self, rows: int) -> Array:
        """Runs so many rows of each picture, SEGMENT_ROWS at most; returns an array that is there afterwards."""
        networks = {name: self.pipe.network(name) for name in ("unet", *self.pipe.controlnets)}
        segment = (np.arange(SEGMENT_ROWS) < rows, self._rows())
        state, denoised, *rest = self._held[:-1]
        done = programs.denoise_segment(self.pipe.mesh, *composed(networks), state, denoised, segment, *rest)
        self._held = self._held._replace(state=done[0], denoised=done[1])
        for job in self.jobs:
            job.row = min(job.row + rows, job.rows)
        return done[1]

    def _rows(self) -> dict[str, np.ndarray]:
        """The next rows of each picture; those of empty places do nothing."""
        jobs = self.jobs
        names = dict.fromkeys(name for job in jobs for name in job.columns)
        shown = [job or jobs[0] for own in self._places for job in own]
        starts = [jobs[0].rows if job is None else job.row for own in self._places for job in own]
        found = {}
        for name in names:
            default = next(job.columns[name] for job in jobs if name in job.columns)
            zeros = np.zeros((SEGMENT_ROWS, *default.shape[1:]), default.dtype)
            parts = [
                job.columns[name][row : row + SEGMENT_ROWS] if name in job.columns else zeros
                for job, row in zip(shown, starts, strict=True)
            ]
            found[name] = np.stack(parts, axis=1)
        return found

    def take(self, jobs: Sequence[Job]) -> tuple["StableDiffusionPipelineOutput", list[tuple[int, Job]]]:
        """The pictures of these, still being computed, and where each is among them; their places are free then."""
        place, found = self._found(jobs)
        (x, original) = arranged(
            self.pipe.mesh, ((self._held.state.x, self._held.original),), np.zeros(len(place), np.int32), place
        )
        seeds = [0] * len(place)
        made = self.pipe.output(x, seeds, "jax", self.pipe.decoder(original, self.group.vae_tiling))
        self.drop(jobs)
        return in_uint8(made), found

    def previews(self, jobs: Sequence[Job]) -> list[Image.Image]:
        """Waits; the pictures of these as the model sees them by now."""
        place, found = self._found(jobs)
        latents = arranged(self.pipe.mesh, (self._held.denoised,), np.zeros(len(place), np.int32), place)
        pictures = self.pipe.preview([0] * len(place), self.pipe.decoder(None, self.group.vae_tiling), latents)
        known = {id(job): pictures[i] for i, job in found}
        return [known[id(job)] for job in jobs]

    def _found(self, jobs: Sequence[Job]) -> tuple[np.ndarray, list[tuple[int, Job]]]:
        """The places of these on each device, filled up to equally many, and where each of these jobs is among them."""
        wanted = set(map(id, jobs))
        own = [[(i, job) for i, job in enumerate(places) if id(job) in wanted] for places in self._places]
        most = _power_of_two(max(map(len, own)))
        place = np.zeros((len(own), most), np.int32)
        found = []
        for device, places in enumerate(own):
            for i, (at, job) in enumerate(places):
                place[device, i] = at
                found.append((device * most + i, job))
        return place.ravel(), found


def _held(mesh: Mesh, prepared: Inputs) -> Held:
    state = programs.start(mesh, prepared.parts, prepared.scales)
    guidance = prepared.guidance(len(prepared.branches))
    own = (prepared.keys, prepared.branches, guidance, prepared.known, prepared.channels, prepared.control)
    return Held(state, prepared.parts[0], *own, prepared.original)


def _columns(prepared: Inputs, image: int, rows: int) -> dict[str, np.ndarray]:
    """The rows of an image's table, and after them SEGMENT_ROWS that do nothing."""
    own = {name: column[:rows, image] for name, column in host_columns(prepared.table).items()}
    idle = host_columns(Table.idle(SEGMENT_ROWS))
    columns = {name: np.concatenate([column, idle[name]]) for name, column in own.items()}
    for name, column in prepared.beside.items():
        column = column[:rows, image]
        columns[name] = np.concatenate([column, np.repeat(column[-1:], SEGMENT_ROWS, axis=0)])
    return columns
