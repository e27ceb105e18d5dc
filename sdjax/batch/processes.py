"""Several processes of one job, one on each host: they meet, let the first one begin, and part; or have fixed shares.

All compute the same plan, and each samples every count-th chunk of it on its own devices. They are connected only until
all have begun. From then on none waits for another or notices its end: what a lost one has not done the next run does.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from sdjax.batch import record
from sdjax.batch.lock import Lock
from sdjax.batch.output import Target

LOCK = ".sdjax-lock.json"
LOCKS = re.compile(r"\.sdjax-lock(-\d+)?\.json")
MEETING_SECONDS = 600  # until all processes have loaded the model
SEEN_SECONDS = 60  # until a network file system shows one host what another one wrote
LOOK_SECONDS = 1.0
WORD = "sdjax/batch/begun"
FAILED = "failed"


@dataclass(frozen=True)
class Process:
    """One of `count` processes of a job."""

    index: int = 0
    count: int = 1
    meets: bool = True
    """whether it has joined the others; otherwise it waits for none, and has a fixed share of the chunks"""

    @property
    def is_first(self) -> bool:
        """Whether this is the one that begins: it holds the job's lock, chooses the batch, writes the record."""
        return self.index == 0 and self.meets

    def share(self, places: int) -> range:
        """Which of so many places in a plan are its own."""
        return range(self.index, places, self.count)

    @contextmanager
    def locked(self, target: Target) -> Iterator[Lock]:
        """Holds this process's lock on a target that can be written to; all but the first wait until that has begun.

        The first one refuses to begin while any process of another run is at work. Raises LockedError, and OSError
        where the first process could not begin or the target is not the folder that it writes to.
        """
        if self.meets and not self.is_first:
            self._wait(target)
        target.probe()
        with Lock(target.fs, target.path(_lock_name(self.index))) as lock:
            if self.is_first:
                for name in lock_names(target):
                    if name != LOCK:
                        with Lock(target.fs, target.path(name)):
                            pass  # of a dead process
            yield lock

    def begun(self, target: Target) -> None:
        """Lets the others write, if this is the first, then waits until all have come this far and parts from them."""
        if self.count > 1 and self.meets:
            if self.is_first:
                _store().key_value_set(WORD, _digest(target))
            jax.distributed.shutdown()
            _state().process_id = 0  # others would not write JAX's cache of programs, of each host

    def _wait(self, target: Target) -> None:
        until = time.monotonic() + MEETING_SECONDS
        while (word := _published()) is None:
            if time.monotonic() > until:
                raise TimeoutError(f"process 0 has not begun for {MEETING_SECONDS} s: see its output")
        if word == FAILED:
            raise ConnectionAbortedError("process 0 could not begin: see its output")
        until = time.monotonic() + SEEN_SECONDS
        while _digest(target) != word:
            if time.monotonic() > until:
                raise FileNotFoundError(
                    f"{target.shown(record.NAME)} is not what process 0 wrote: all hosts must share this folder; give "
                    "one on a network file system or in an object store"
                )
            time.sleep(LOOK_SECONDS)


ALONE = Process()


def share(text: str) -> Process:
    """ "3/16": the third of sixteen processes that do not meet. Raises ValueError for another text."""
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text, re.ASCII)
    if not match or int(match[1]) > int(match[2]):
        raise ValueError(f"{text}: not a share such as 3/16, from 1/16 to 16/16")
    return Process(int(match[1]) - 1, int(match[2]), meets=False)


@contextmanager
def join(coordinator: str | None = None, count: int | None = None, index: int | None = None) -> Iterator[Process]:
    """Meets the other processes of a job, before JAX does anything else, and yields which of them this is.

    coordinator: "host:port" of the first process, reachable from all hosts; count, index: how many processes there are,
    and which this is, from 0. All None: JAX finds them out, on Cloud TPU, under Slurm, Open MPI and Kubernetes.
    One meeting is for one run. A process that is lost before all have begun ends the others with it. Raises ValueError
    where there is nothing to be found out, or only a part is given.
    """
    given = [value is not None for value in (coordinator, count, index)]
    if any(given) != all(given):
        raise ValueError("coordinator, processes and index belong together: give all three, or none")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=MEETING_SECONDS,
            shutdown_timeout_seconds=MEETING_SECONDS,
        )
    except ValueError as error:
        raise ValueError(f"{error} Give --coordinator HOST:PORT, --processes N and --index I") from None
    if _is_only_one_here():
        for platform in ("cuda", "rocm"):
            jax.config.update(f"jax_{platform}_visible_devices", "all")
    process = Process(_state().process_id, _state().num_processes)
    try:
        yield process
    finally:
        if jax.distributed.is_initialized():  # it has not begun
            if process.is_first:
                _store().key_value_set(WORD, FAILED)
            jax.distributed.shutdown()


def _is_only_one_here() -> bool:
    """Whether a launcher started one process on each host: JAX would give it the first GPU alone."""
    slurm = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0]
    return "JAX_LOCAL_DEVICE_IDS" not in os.environ and os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", slurm) == "1"


def _state() -> Any:
    from jax._src import distributed  # JAX has its key-value store under no public name

    return distributed.global_state


def _store() -> Any:
    return _state().client


def _published() -> str | None:
    """What the first process has published, waited for a little."""
    try:
        return _store().blocking_key_value_get(WORD, int(1000 * LOOK_SECONDS))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise ConnectionAbortedError(f"process 0 is lost: {error}") from error
        return None


def _digest(target: Target) -> str:
    """The hash of the target's record."""
    return hashlib.sha256(target.read(record.NAME) or b"").hexdigest()


def _lock_name(index: int) -> str:
    return f".sdjax-lock-{index}.json" if index else LOCK


def lock_names(target: Target) -> list[str]:
    """The names of the locks at a target, one for each process at work or dead."""
    return sorted(name for name in target.names() if LOCKS.fullmatch(name))
