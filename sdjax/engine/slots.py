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
from sdjax.runtime import parallel, programs
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


@partial(Program, static=(0,))
def picked(mesh: Mesh, tree: Any, places: np.ndarray) -> Any:
    """Of arrays [B ...] the images at these places [B'], of each device's share."""

    def run(tree: Any, places: Array) -> Any:
        return jax.tree.map(lambda leaf: jnp.take(leaf, places, axis=0), tree)

    return shard_map(run, mesh, (DATA, DATA), DATA)(tree, places)


@partial(Program, static=(0,))
def put(mesh: Mesh, tree: Any, new: Any, places: np.ndarray, is_new: np.ndarray) -> Any:
    """Arrays [B ...] with one image of each device's share in place of another: that of new [devices ...] at `places`
    [devices] where `is_new` [devices]."""

    def run(tree: Any, new: Any, places: Array, is_new: Array) -> Any:
        def one(leaf: Array, added: Array) -> Array:
            return leaf.at[places[0]].set(jnp.where(is_new[0], added[0], leaf[places[0]]))

        return jax.tree.map(one, tree, new)

    return shard_map(run, mesh, (DATA, DATA, DATA, DATA), DATA)(tree, new, places, is_new)


class Slots:
    """The places for pictures of one group, equally many on each device: a power of two, as few as hold them."""

    def __init__(self, pipe: "StableDiffusionPipeline", group: Group):
        self.pipe, self.group = pipe, group
        self._held: Held | None = None
        self._places: list[list[Job | None]] = [[] for _ in range(pipe.mesh.size)]  # of each device

    @property
    def jobs(self) -> list[Job]:
        """Those whose pictures are under way, or done and not taken."""
        return [job for own in self._places for job in own if job is not None]

    @property
    def width(self) -> int:
        """The places on each device."""
        return len(self._places[0])

    def open_devices(self, most: int) -> list[int]:
        """Those with fewer pictures than this, those with the fewest first."""
        counts = self._counts()
        return sorted((device for device, count in enumerate(counts) if count < most), key=counts.__getitem__)

    def admit(self, jobs: Sequence[Job], devices: Sequence[int]) -> bool:
        """Begins with a job on each of these devices; False where their arrays have another form than those under way.

        Raises ValueError where a request cannot be prepared.
        """
        added = dict(zip(devices, jobs, strict=True))
        shown = [added.get(device, jobs[0]) for device in range(len(self._places))]
        prepared = inputs.prepare(self.pipe, [job.request for job in shown])
        new = _held(self.pipe.mesh, prepared)
        if self._held is not None and new.form != self._held.form:
            return False
        self._widen(max(self._counts()[device] + 1 for device in devices), new)
        places = [own.index(None) if None in own else 0 for own in self._places]
        is_new = np.array([device in added for device in range(len(places))])
        for device, job in added.items():
            job.columns = _columns(prepared, device, job.rows)
        self._held = put(self.pipe.mesh, self._held, new, np.int32(places), is_new)
        for device, job in added.items():
            self._places[device][places[device]] = job
        return True

    def drop(self, jobs: Sequence[Job]) -> None:
        """Frees the places of these."""
        gone = set(map(id, jobs))
        self._places = [[None if id(job) in gone else job for job in own] for own in self._places]

    def narrow(self) -> None:
        """Leaves out places that are not needed."""
        if self.jobs:
            self._resize(parallel.padded_size(max(self._counts()), 1))

    def _counts(self) -> list[int]:
        """The pictures on each device."""
        return [sum(job is not None for job in own) for own in self._places]

    def _widen(self, needed: int, new: Held) -> None:
        """Has at least so many places on each device."""
        if self._held is None:
            self._held, self._places = new, [[None] for _ in self._places]
        if needed > self.width:
            self._resize(parallel.padded_size(needed, 1))

    def _resize(self, width: int) -> None:
        if width == self.width:
            return
        kept = [[(i, job) for i, job in enumerate(own) if job is not None] for own in self._places]
        kept = [(own + [(0, None)] * width)[:width] for own in kept]
        self._held = picked(self.pipe.mesh, self._held, np.int32([i for own in kept for i, _ in own]))
        self._places = [[job for _, job in own] for own in kept]

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
        """The pictures of these, one of a device at most, still being computed, and the place of each among them.

        Their places here are free then.
        """
        places, found = self._found(jobs)
        latents, original = picked(self.pipe.mesh, (self._held.state.x, self._held.original), places)
        decode = self.pipe.decoder(original, self.group.vae_tiling)
        made = in_uint8(self.pipe.output(latents, [0] * len(places), "jax", decode))
        self.drop(jobs)
        return made, found

    def previews(self, jobs: Sequence[Job]) -> list[Image.Image]:
        """Waits; the pictures of these, one of a device at most, as the model sees them by now, in their order."""
        places, found = self._found(jobs)
        latents = picked(self.pipe.mesh, self._held.denoised, places)
        pictures = self.pipe.preview([0] * len(places), self.pipe.decoder(None, self.group.vae_tiling), latents)
        known = {id(job): pictures[device] for device, job in found}
        return [known[id(job)] for job in jobs]

    def _found(self, jobs: Sequence[Job]) -> tuple[np.ndarray, list[tuple[int, Job]]]:
        """A place of each device, and on which device each of these jobs is."""
        wanted, places, found = set(map(id, jobs)), np.zeros(len(self._places), np.int32), []
        for device, own in enumerate(self._places):
            for i, job in enumerate(own):
                if id(job) in wanted:
                    places[device] = i
                    found.append((device, job))
        return places, found

    def one_of_each_device(self, jobs: Sequence[Job]) -> list[Job]:
        """Of these, one of each device that has some."""
        wanted = set(map(id, jobs))
        first = (next((job for job in own if id(job) in wanted), None) for own in self._places)
        return [job for job in first if job is not None]


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
