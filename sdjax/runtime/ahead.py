"""Programs compiled ahead of time: a file of executables, which spares a process tracing, lowering and compiling."""

import functools
import hashlib
import json
import os
import pickle
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from sdjax.checkpoints.content import check_regular
from sdjax.files import replacing
from sdjax.runtime import jax_settings
from sdjax.runtime.network import Graph

MAGIC = b"sdjax compiled programs\n"
DIGEST = "digest"
LONGEST_HEADER = 1 << 20  # bytes
VERSIONS = ("jax", "jaxlib", "flax", "numpy")
SETTINGS = ("jax_default_matmul_precision",)
"""What the caller chooses of JAX that decides what a program computes; the rest is `jax_settings.FIXED`"""


class Executable(NamedTuple):
    """A compiled program as bytes."""

    content: bytes
    in_tree: Any
    out_tree: Any
    devices: list[int]
    """ids, in the order of the mesh"""

    def ready(self) -> jax.stages.Compiled:
        """It, on its devices."""
        devices = {device.id: device for device in jax.local_devices()}
        on = [devices[number] for number in self.devices]
        return serialize_executable.deserialize_and_load(
            self.content, self.in_tree, self.out_tree, backend=on[0].client, execution_devices=on
        )


Executables = dict[str, Executable]
"""By signature"""


class Program:
    """A jitted function that takes its executables from the file that is loaded, where that has them.

    Called with concrete arrays; what it computes does not depend on the caller's settings of JAX but for precision.
    static: the positions of the arguments that are compiled in, of which the first is the mesh; static_names: such
    keywords; donated: as `jax.jit` has it.
    """

    def __init__(
        self,
        function: Callable,
        *,
        static: Sequence[int],
        static_names: Sequence[str] = (),
        donated: Sequence[int] = (),
    ):
        functools.update_wrapper(self, function)
        self._static = frozenset(static)
        self._jitted = jax.jit(
            function, static_argnums=tuple(static), static_argnames=tuple(static_names), donate_argnums=tuple(donated)
        )

    @jax_settings.fixed()
    def lower(self, *args: Any, **options: Any) -> jax.stages.Lowered:
        """As that of a jitted function."""
        return self._jitted.lower(*args, **options)

    @jax_settings.fixed()
    def __call__(self, *args: Any, **options: Any) -> Any:
        if _recorded is None and _loaded is None:
            return self._jitted(*args, **options)
        constants = tuple(arg for i, arg in enumerate(args) if i in self._static)
        arrays = [arg for i, arg in enumerate(args) if i not in self._static]
        leaves, tree = jax.tree.flatten(arrays)
        key = (self.__name__, constants, tuple(options.items()), tree, tuple((x.shape, x.dtype) for x in leaves))
        if _recorded is not None:
            return self._record(_recorded, key, args, options)
        executable = _loaded.get(key)
        return self._jitted(*args, **options) if executable is None else executable(*arrays)

    def _record(self, recorded: Executables, key: tuple, args: tuple, options: dict[str, Any]) -> Any:
        """Keeps the executable and computes nothing: returns zeros."""
        compiled = self.lower(*args, **options).compile()
        devices = [device.id for device in args[0].devices.flat]
        recorded[_signature(key)] = Executable(*serialize_executable.serialize(compiled), devices)
        zeros = jax.tree.map(lambda info: np.zeros(info.shape, info.dtype), compiled.out_info)
        return jax.device_put(zeros, compiled.output_shardings)


class Loaded:
    """The executables of a file, which threads make ready while the weights are read."""

    def __init__(self, path: Path, executables: Executables):
        self._path = path
        self._found: dict[tuple, Callable | None] = {}
        mine = {device.id for device in jax.local_devices()}
        fitting = {signature: own for signature, own in executables.items() if mine.issuperset(own.devices)}
        threads = ThreadPoolExecutor()
        self._futures = {signature: threads.submit(executable.ready) for signature, executable in fitting.items()}
        threads.shutdown(wait=False)

    def get(self, key: tuple) -> Callable | None:
        """What was compiled for this; warns the first time that there is nothing."""
        if key not in self._found:
            self._found[key] = self._find(key)
        return self._found[key]

    def _find(self, key: tuple) -> Callable | None:
        try:
            return self._futures[_signature(key)].result()
        except (KeyError, ValueError):
            warnings.warn(f"{self._path}: has no program {key[0]!r} for this model, batch and size", stacklevel=2)
            return None


_recorded: Executables | None = None
_loaded: Loaded | None = None


@contextmanager
def recording() -> Iterator[Executables]:
    """Programs that are called meanwhile are compiled and kept in what this gives; they return zeros.

    Every one is compiled anew: what a cache gave back may lack code when it is written a second time.
    """
    global _recorded
    cached = jax.config.jax_enable_compilation_cache
    try:
        _recorded = {}
        _enable_disk_cache(False)
        jax.clear_caches()
        yield _recorded
    finally:
        _recorded = None
        _enable_disk_cache(cached)


def _enable_disk_cache(wanted: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", wanted)
    compilation_cache.reset_cache()  # which reads the setting once


def write(path: str | os.PathLike, executables: Executables) -> None:
    """Writes a file that `load` reads, whole or not at all."""
    content = pickle.dumps(executables)
    header = json.dumps(environment() | {DIGEST: _digest(content)}, allow_nan=False).encode()
    with replacing(path) as temporary:
        temporary.write_bytes(MAGIC + header + b"\n" + content)


def load(path: str | os.PathLike) -> bool:
    """From now on programs come from this file where it has them. Returns whether it is of use here.

    Pictures are the same to the bit. Made with other versions or settings, by other code or for another kind of device
    it is not used, with a UserWarning. Raises FileNotFoundError, and ValueError for a file that is damaged or of
    another kind. The file holds machine code and pickled objects: load none that you would not run.
    """
    global _loaded
    _loaded = None
    check_regular(Path(path))
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path}: not a file that `sdjax compile` made")
        header, content = file.readline(LONGEST_HEADER), file.read()
    try:
        made, here = dict(json.loads(header)), environment()
        is_whole = made.pop(DIGEST) == _digest(content)
    except (KeyError, TypeError, ValueError, RecursionError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{path}: damaged; compile it again")
    if differing := [name for name in here if made.get(name) != here[name]]:
        warnings.warn(f"{path}: not used, compiled for another {', another '.join(differing)}", stacklevel=2)
        return False
    _loaded = Loaded(Path(path), pickle.loads(content))
    return True


def unload() -> None:
    """From now on programs are compiled where they are called."""
    global _loaded
    _loaded = None


def environment() -> dict[str, Any]:
    """What executables are made for and by: versions, code, devices, and the settings that decide what is compiled."""
    device = jax.local_devices()[0]
    return {
        "sdjax": version("sdjax"),
        "code": _code(),
        **{name: version(name) for name in VERSIONS},
        "kind of device": device.device_kind,
        "runtime": device.client.platform_version,
        "processor": _processor() if device.platform == "cpu" else "",
        **{name: getattr(jax.config, name) for name in SETTINGS},
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def _code() -> str:
    """Changes with every change of the code that programs are traced from."""
    folder = Path(__file__).parents[1]
    files = sorted(folder.rglob("*.py"))
    return _digest(b"".join(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes() for file in files))


def _processor() -> str:
    """The instructions that the processor has, where the system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = [line for line in lines if line.lower().startswith(("flags", "features"))][:1]
    return f"{platform.machine()} {_digest(''.join(flags).encode())}"


def _signature(key: tuple) -> str:
    """The same in every process for programs that are the same."""
    name, constants, options, tree, leaves = key
    shapes = [(shape, str(dtype)) for shape, dtype in leaves]
    return _digest(repr([name, *map(_described, constants), options, str(tree), shapes]).encode())


def _described(constant: Any) -> Any:
    if isinstance(constant, Mesh):
        return constant.axis_names, constant.devices.shape, [device.id for device in constant.devices.flat]
    if isinstance(constant, Graph):
        return constant.digest
    return [_described(part) for part in constant] if isinstance(constant, tuple | list) else constant


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
