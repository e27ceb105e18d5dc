"""PyTorch's pickled weights (.bin, .pt, .pth, .ckpt) without PyTorch, and without running any of its code.

A pickle is a program: it names functions and calls them. Here a name stands for an entry of the table below, which
makes tensors, dicts and plain values and reaches nothing else; a name that is not there is refused. None is imported.
Both containers are read: the zip of PyTorch 1.6 and later, and the stream of pickles before it.
"""

import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from sdjax.checkpoints import memory
from sdjax.checkpoints.errors import CheckpointError

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older container
PROTOCOL = 1001  # its second
UNREAD = object()  # the storages of a pickle whose structure alone is read
LOCAL_HEADER = 30  # bytes of a zip entry's own header, before its name and its extra field


class Storage(NamedTuple):
    """The dtype that a storage class of PyTorch stands for."""

    dtype: np.dtype


class Items(dict):
    """A dict that takes no attributes: in place of an OrderedDict, or of the parameters in a ParameterDict."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping) and isinstance(parameters := state.get("_parameters"), Mapping):
            self.update(parameters)


class Admitted:
    """What a name of the table becomes in a pickle: it can be called if it stands for a function, and never altered."""

    __slots__ = ("call", "name")

    def __init__(self, name: str, call: Callable | None = None):
        self.name, self.call = name, call

    def __call__(self, *args: Any) -> Any:
        if self.call is None:
            raise pickle.UnpicklingError(f"calls {self.name}, which is no function")
        return self.call(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"alters {self.name}")

    def __repr__(self) -> str:
        return self.name


class DType:
    """A numpy dtype as pickles spell it: a code, then a state that holds the byte order."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if code not in SCALARS:
            raise pickle.UnpicklingError(f"numpy values of dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] == ">":
            raise pickle.UnpicklingError("numpy values in big-endian order")


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray | None:
    """The view of a flat storage that starts at offset; size and stride count elements."""
    if storage is UNREAD:
        return None
    numbers = (offset, *size, *stride)
    if not all(type(n) is int and n >= 0 for n in numbers) or len(size) != len(stride):
        raise pickle.UnpicklingError(f"a tensor of size {size}, stride {stride} at {offset}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.size:
        raise pickle.UnpicklingError(f"a tensor of size {size}, stride {stride} at {offset} in {storage.size} elements")
    start, strides = offset * storage.itemsize, [step * storage.itemsize for step in stride]
    return np.ndarray(size, storage.dtype, storage, start if math.prod(size) else 0, strides)


def _parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data


def _scalar(dtype: DType, data: bytes) -> Any:
    return np.frombuffer(data, dtype.dtype)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """How Python 2's protocols spell bytes."""
    return text.encode({"latin1": "latin1"}[encoding])


SCALARS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
STORAGES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
DTYPES = ("float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool")
FUNCTIONS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": tuple,
    "numpy.dtype": DType,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "_codecs.encode": _encode,
    "builtins.set": set,
    "__builtin__.set": set,
}
TABLE: dict[str, Any] = {
    **{f"torch.{name}": Storage(np.dtype(dtype)) for name, dtype in STORAGES.items()},
    **{f"torch.{name}": Admitted(f"torch.{name}") for name in DTYPES},
    **{name: Admitted(name, call) for name, call in FUNCTIONS.items()},
    "collections.OrderedDict": Items,
    # textual inversion of 2022 keeps its embeddings in one
    "torch.nn.modules.container.ParameterDict": Items,
    # Stable Diffusion 1.4 as published has this class as the key of what a callback remembered
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": Admitted("ModelCheckpoint"),
}


class Unpickler(pickle.Unpickler):
    """Resolves the names of the table and no others. storage(dtype, key, elements) gives a flat array."""

    def __init__(self, file: BinaryIO, storage: Callable[[np.dtype, str, int], np.ndarray]):
        super().__init__(file)
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        """An entry of the table. Nothing is imported."""
        try:
            return TABLE[f"{module}.{name}"]
        except KeyError:
            raise Refused(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> np.ndarray:
        """pid: ("storage", class, key, device, elements[, None])"""
        kind, cls, key, _, elements, *view = pid
        if kind != "storage" or not isinstance(cls, Storage) or view not in ([], [None]):
            raise pickle.UnpicklingError(f"no storage: {pid}")
        if not isinstance(key, str) or type(elements) is not int or elements < 0:
            raise pickle.UnpicklingError(f"a storage of {elements} elements with key {key!r}")
        return self.storage(cls.dtype, key, elements)


class Refused(Exception):
    """A name that is not in the table."""


def load(path: Path) -> Any:
    """What torch.save wrote: tensors are read-only arrays in a memory map, containers and numbers are Python's own.

    Raises CheckpointError naming the file: for a name that is not admitted (naming it as well), a storage or a tensor
    that goes past the end, a file that is truncated or none of PyTorch's.
    """
    try:
        with open(path, "rb") as file:
            read = _read_zip if file.read(4) == b"PK\x03\x04" else _read_stream
            file.seek(0)
            return read(file, memory.mapped(path))
    except Refused as error:
        raise CheckpointError(
            f"{path}: refused: it uses {error}, which is no tensor and could run code. "
            "Nothing was run. If you trust the file, convert it to safetensors where PyTorch is installed"
        ) from None
    except OSError:
        raise
    except Exception as error:  # a pickle can fail in as many ways as there are opcodes
        raise CheckpointError(f"{path}: truncated, or no weights saved by PyTorch: {error}") from error


def _read_zip(file: BinaryIO, data: np.ndarray) -> Any:
    """<any name>/data.pkl, and <any name>/data/<key> with the bytes of each storage, uncompressed."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("a zip archive of something else; if the weights are in it, unpack it first")
        [root] = roots
        order = entries.get(f"{root}byteorder")
        if order and archive.read(order) != b"little":
            raise ValueError("its numbers are in big-endian order")

        def storage(dtype: np.dtype, key: str, elements: int) -> np.ndarray:
            entry = entries[f"{root}data/{key}"]
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < elements * dtype.itemsize:
                raise ValueError(f"{entry.filename} does not hold {elements} elements of {dtype}")
            lengths = memory.part(
                data, entry.header_offset + LOCAL_HEADER - 4, np.dtype("<u2"), 2
            )  # of name and extra field
            start = entry.header_offset + LOCAL_HEADER + int(lengths.sum(dtype=np.int64))
            return memory.part(data, start, dtype, elements)

        with archive.open(f"{root}data.pkl") as program:
            return Unpickler(program, storage).load()


def _read_stream(file: BinaryIO, data: np.ndarray) -> Any:
    """magic, protocol, system, object, storage keys: five pickles; then each storage: its length (int64), its bytes.

    The object is read twice: where its storages lie follows from all their sizes.
    """
    if (_plain(file), _plain(file)) != (MAGIC, PROTOCOL) or not _plain(file)["little_endian"]:
        raise ValueError("not the beginning that PyTorch writes")
    at, dtypes, places = file.tell(), {}, {}

    def look(dtype: np.dtype, key: str, _: int) -> Any:
        dtypes[key] = dtype
        return UNREAD

    Unpickler(file, look).load()
    keys, end = _plain(file), file.tell()
    for key in keys:
        [length] = memory.part(data, end, np.dtype("<i8"), 1).tolist()
        places[key] = memory.part(data, end + 8, dtypes[key], length)
        end += 8 + places[key].nbytes

    def storage(dtype: np.dtype, key: str, elements: int) -> np.ndarray:
        if places[key].dtype != dtype or places[key].size < elements:
            raise ValueError(f"storage {key} does not hold {elements} elements of {dtype}")
        return places[key]

    file.seek(at)
    return Unpickler(file, storage).load()


def _plain(file: BinaryIO) -> Any:
    return Unpickler(file, lambda *_: UNREAD).load()
