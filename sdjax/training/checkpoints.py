"""The checkpoints of a run, by orbax: each is there whole or not at all, whatever ends the process."""

import gc
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

STATE = "state"
SPARE = 1.1  # of a checkpoint's bytes: room for its file names and headers


class NotWrittenError(OSError):
    """A checkpoint that could not be written, most often because the disk is full."""


class Checkpoints:
    """The states of a run after some of its steps, in a folder: the last `limit` of them.

    A state is a pytree of arrays; what is restored has the bits, dtypes and shardings of what was saved.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self._limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=limit, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def steps(self) -> list[int]:
        """After which steps there are states, ascending."""
        return sorted(self._manager.all_steps())

    def check_room(self, state: Any) -> None:
        """Raises NotWrittenError where the disk has no room for one more state than are kept."""
        one = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        needed = int(SPARE * one * (self._limit + 1 - len(self.steps)))
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise NotWrittenError(
                f"{self.folder}: {needed:,} bytes are needed for {self._limit} checkpoints and the next, "
                f"and {free:,} are free"
            )

    def save(self, step: int, state: Any) -> None:
        """Keeps the state after a step. Raises NotWrittenError, after which those that were kept are as they were."""
        if step in self.steps:
            return
        try:
            self._manager.save(step, args=ocp.args.Composite(**{STATE: ocp.args.StandardSave(state)}))
            self._manager.wait_until_finished()
        except Exception as error:  # of many types, by tensorstore
            failure = _brief(error)
        else:
            return
        gc.collect()  # what orbax had begun, which else complains at the end of the process
        kept = f"the last one is of step {self.steps[-1]}" if self.steps else "there is none before it"
        raise NotWrittenError(f"{self.folder}: the checkpoint of step {step} could not be written, {kept}: {failure}")

    def restore(self, step: int, like: Any) -> Any:
        """The state after a step, with the structure, dtypes and shardings of `like`.

        Raises ValueError for a checkpoint of another structure, or a damaged one.
        """
        try:
            args = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(jax.tree.map(_described, like))})
            return self._manager.restore(step, args=args)[STATE]
        except Exception as error:  # of many types, by orbax and tensorstore
            raise ValueError(f"{self.folder}: the checkpoint of step {step} cannot be read: {_brief(error)}") from error

    def drop_after(self, step: int) -> None:
        """Removes the states of later steps."""
        for later in self.steps:
            if later > step:
                self._manager.delete(later)

    def close(self) -> None:
        """Ends the threads of orbax."""
        self._manager.close()


def _described(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no number in a tree of arrays is NaN or infinite."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats] or [jnp.array(True)]).all()
