"""PyTorch's pickled weights (.bin, .pt, .pth, .ckpt) without PyTorch, and without running any of its code.

A pickle is a program for a machine with a stack: it names functions and calls them. The machine here has the opcodes
that make plain values; a name stands for an entry of the table below, which makes tensors and dicts and reaches nothing
else. A name that is not there is refused. None is imported. What a program may make is bounded by the file's size.
Both containers are read: the zip of PyTorch 1.6 and later, and the stream of pickles before it.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from sdjax.checkpoints import memory
from sdjax.checkpoints.content import check_regular
from sdjax.checkpoints.errors import CheckpointError
from sdjax.fields import brief

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older container
PROTOCOL = 1001  # its second
BYTE = np.dtype(np.uint8)
UNREAD = object()  # the storages of a pickle whose structure alone is read
LOCAL_HEADER = 30  # bytes of a zip entry's own header, before its name and its extra field
LARGEST_PROGRAM = 64 << 20  # bytes; that of the largest Stable Diffusion 1 has one million
MOST_OPERATIONS = 500_000  # SDXL with its averages and the optimizer takes half
LONGEST_INTEGER = 1024  # bits
UNFOLDED, LEAST_ROOM = 4, 1 << 20  # times the size of its file, and bytes beside them, that a program may make


class Storage(NamedTuple):
    """The dtype that a storage class of PyTorch stands for."""

    dtype: np.dtype


class Items(dict):
    """An OrderedDict or the parameters of a ParameterDict, whose state is read and not set."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """What a name of the table becomes in a pickle: it can be called if it stands for a function."""

    name: str
    call: Callable | None = None

    def __repr__(self) -> str:
        return self.name


class DType:
    """A numpy dtype as pickles spell it: a code, then a state that holds the byte order."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if code not in SCALARS:
            raise ValueError(f"numpy values of dtype {brief(code)}")
        self.dtype = np.dtype(code)


def _tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray | None:
    """The view of a flat storage that starts at offset; size and stride count elements."""
    if storage is UNREAD:
        return None
    numbers = (offset, *size, *stride)
    wanted = f"a tensor of size {brief(size)}, stride {brief(stride)} at {brief(offset)}"
    if not all(type(n) is int and n >= 0 for n in numbers) or len(size) != len(stride):
        raise ValueError(wanted)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.size:
        raise ValueError(f"{wanted} in {storage.size} elements")
    start, strides = offset * storage.itemsize, [step * storage.itemsize for step in stride]
    try:
        return np.ndarray(size, storage.dtype, storage, start if math.prod(size) else 0, strides)
    except ValueError as error:
        raise ValueError(f"{wanted}: {error}") from None


def _parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data


def _scalar(dtype: DType, data: bytes) -> Any:
    return np.frombuffer(data, dtype.dtype)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """How Python 2's protocols spell bytes."""
    return text.encode({"latin1": "latin1"}[encoding])


def _items(pairs: Iterable = ()) -> Items:
    return Items((_hashable(key), value) for key, value in pairs)


def _set(values: Iterable = ()) -> set:
    return {_hashable(value) for value in values}


def _hashable(key: Any) -> Any:
    """The key, unless to hash it could take long: a tuple may hold another one many times, and integers collide."""
    if not isinstance(key, str | bytes | float | bool | Admitted | None) and not (
        type(key) is int and abs(key) < 2**60
    ):
        raise ValueError(f"a key that is {brief(type(key).__name__)}")
    return key


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
    "builtins.set": _set,
    "__builtin__.set": _set,
    "collections.OrderedDict": _items,
    # textual inversion of 2022 keeps its embeddings in one
    "torch.nn.modules.container.ParameterDict": _items,
}
TABLE: dict[str, Any] = {
    **{f"torch.{name}": Storage(np.dtype(dtype)) for name, dtype in STORAGES.items()},
    **{f"torch.{name}": Admitted(f"torch.{name}") for name in DTYPES},
    **{name: Admitted(name, call) for name, call in FUNCTIONS.items()},
    # Stable Diffusion 1.4 as published has this class as the key of what a callback remembered
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": Admitted("ModelCheckpoint"),
}


class Machine:
    """Runs one program, of a file of this size. storage(dtype, key, elements) gives a flat array."""

    def __init__(self, storage: Callable[[np.dtype, str, int], np.ndarray], size: int):
        self.storage, self.room = storage, LEAST_ROOM + UNFOLDED * size
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: BinaryIO) -> Any:
        """What the program makes. The file is left where it ends."""
        for number, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            if number == MOST_OPERATIONS:
                raise ValueError(f"a program of more than {MOST_OPERATIONS:,} operations")
            if opcode.name not in OPERATIONS:
                raise ValueError(f"the operation {opcode.name}")
            OPERATIONS[opcode.name](self, argument)
        return self.stack.pop()

    def push(self, value: Any) -> None:
        if type(value) is int and value.bit_length() > LONGEST_INTEGER:
            raise ValueError(f"an integer of {value.bit_length()} bits")
        self.stack.append(value)

    def popped(self, count: int) -> list[Any]:
        """The last values, which are taken off the stack."""
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise ValueError("the stack is empty")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def since_mark(self) -> list[Any]:
        """The values since the last mark."""
        values = self.popped(len(self.stack) - self.marks[-1])
        self.marks.pop()
        return values

    def spend(self, size: int) -> None:
        """Accounts for bytes that are made."""
        self.room -= size
        if self.room < 0:
            raise ValueError(f"it unfolds to more than {UNFOLDED} times the size of the file")

    def extend(self, values: list[Any]) -> None:
        [target] = self.stack[-1:]
        if type(target) is not list:
            raise ValueError(f"appends to a {type(target).__name__}")
        target.extend(values)

    def update(self, values: list[Any]) -> None:
        [target] = self.stack[-1:]
        if not isinstance(target, dict) or len(values) % 2:
            raise ValueError(f"sets items of a {type(target).__name__}")
        target.update(zip(map(_hashable, values[::2]), values[1::2], strict=True))

    def add(self, values: list[Any]) -> None:
        [target] = self.stack[-1:]
        if type(target) is not set:
            raise ValueError(f"adds to a {type(target).__name__}")
        target.update(map(_hashable, values))

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Admitted) or function.call is None or not isinstance(arguments, tuple):
            raise ValueError(f"calls {brief(function)}, which is no function")
        self.spend(sum(8 * len(own) for own in arguments if isinstance(own, str | bytes | list | tuple | dict | set)))
        made = function.call(*arguments)
        self.spend(made.nbytes if isinstance(made, np.ndarray) else 0)
        self.push(made)

    def build(self, state: Any) -> None:
        """Sets the state of the value on the stack: of what is a dict the parameters, of a dtype nothing."""
        [target] = self.stack[-1:]
        if isinstance(target, DType) and isinstance(state, tuple):
            if state[1] == ">":
                raise ValueError("numpy values in big-endian order")
        elif not isinstance(target, Items):
            raise ValueError(f"alters {brief(target)}")
        elif isinstance(state, dict) and isinstance(parameters := state.get("_parameters"), dict):
            self.spend(8 * len(parameters))
            target.update(parameters)

    def persistent(self, pid: Any) -> Any:
        """pid: ("storage", class, key, device, elements[, None])"""
        kind, cls, key, _, elements, *view = pid
        if kind != "storage" or not isinstance(cls, Storage) or len(view) > 1 or any(own is not None for own in view):
            raise ValueError(f"no storage: {brief(pid)}")
        if not isinstance(key, str) or type(elements) is not int or elements < 0:
            raise ValueError(f"a storage of {brief(elements)} elements with key {brief(key)}")
        return self.storage(cls.dtype, key, elements)


def _named(module: str, name: str) -> Any:
    """An entry of the table. Nothing is imported."""
    try:
        return TABLE[f"{module}.{name}"]
    except KeyError:
        raise Refused(f"{module}.{name}") from None


LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
)
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
OPERATIONS: dict[str, Callable[[Machine, Any], Any]] = {
    **dict.fromkeys(LITERALS, Machine.push),
    **{name: lambda m, _, make=make: m.push(make()) for name, make in EMPTY.items()},
    **{name: lambda m, _, value=value: m.push(value) for name, value in CONSTANTS.items()},
    **{f"TUPLE{n}": lambda m, _, n=n: m.push(tuple(m.popped(n))) for n in (1, 2, 3)},
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda m, index: m.memo.update({index: m.stack[-1]})),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: m.call(*m.popped(2))),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    "MEMOIZE": lambda m, _: m.memo.update({len(m.memo): m.stack[-1]}),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.popped(1),
    "POP_MARK": lambda m, _: m.since_mark(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "LIST": lambda m, _: m.push(m.since_mark()),
    "DICT": lambda m, _: (values := m.since_mark(), m.push({}), m.update(values)),
    "APPEND": lambda m, _: m.extend(m.popped(1)),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.update(m.popped(2)),
    "SETITEMS": lambda m, _: m.update(m.since_mark()),
    "ADDITEMS": lambda m, _: m.add(m.since_mark()),
    "GLOBAL": lambda m, names: m.push(_named(*names.split(" ", 1))),
    "STACK_GLOBAL": lambda m, _: m.push(_named(*m.popped(2))),
    "BUILD": lambda m, _: m.build(*m.popped(1)),
    "BINPERSID": lambda m, _: m.push(m.persistent(*m.popped(1))),
}
"""By the name of the opcode in `pickletools`"""


class Refused(Exception):
    """A name that is not in the table."""


def load(path: Path) -> Any:
    """What torch.save wrote: tensors are read-only arrays in a memory map, containers and numbers are Python's own.

    Raises CheckpointError naming the file: for a name that is not admitted (naming it as well), a storage or a tensor
    that goes past the end, a file that is truncated or none of PyTorch's.
    """
    check_regular(path)
    try:
        with open(path, "rb") as file:
            read = _read_zip if file.read(4) == b"PK\x03\x04" else _read_stream
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

    def content(name: str, dtype: np.dtype, elements: int | None = None) -> np.ndarray:
        entry = entries[name]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{brief(name)} is compressed, which PyTorch's are not")
        elements = entry.file_size if elements is None else elements
        if entry.file_size < elements * dtype.itemsize:
            raise ValueError(f"{brief(name)} does not hold {elements} elements of {dtype}")
        # of the name and of the extra field
        lengths = memory.part(data, entry.header_offset + LOCAL_HEADER - 4, np.dtype("<u2"), 2)
        start = entry.header_offset + LOCAL_HEADER + int(lengths.sum(dtype=np.int64))
        return memory.part(data, start, dtype, elements)

    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("a zip archive of something else; if the weights are in it, unpack it first")
    [root] = roots
    if f"{root}byteorder" in entries and content(f"{root}byteorder", BYTE).tobytes() != b"little":
        raise ValueError("its numbers are in big-endian order")
    program = content(f"{root}data.pkl", BYTE)
    if program.size > LARGEST_PROGRAM:
        raise ValueError(f"a program of {program.size} bytes")
    machine = Machine(lambda dtype, key, n: content(f"{root}data/{key}", dtype, n), data.size)
    return machine.run(io.BytesIO(program.tobytes()))


def _read_stream(file: BinaryIO, data: np.ndarray) -> Any:
    """magic, protocol, system, object, storage keys: five pickles; then each storage: its length (int64), its bytes.

    The object is read twice: where its storages lie follows from all their sizes.
    """
    file, dtypes, places = io.BytesIO(data[:LARGEST_PROGRAM].tobytes()), {}, {}

    def plain() -> Any:
        return Machine(lambda *_: UNREAD, data.size).run(file)

    if (plain(), plain()) != (MAGIC, PROTOCOL) or not plain()["little_endian"]:
        raise ValueError("not the beginning that PyTorch writes")
    at = file.tell()

    def look(dtype: np.dtype, key: str, _: int) -> Any:
        dtypes[key] = dtype
        return UNREAD

    Machine(look, data.size).run(file)
    keys, end = plain(), file.tell()
    for key in map(_hashable, keys):
        [length] = memory.part(data, end, np.dtype("<i8"), 1).tolist()
        places[key] = memory.part(data, end + 8, dtypes[key], length)
        end += 8 + places[key].nbytes

    def storage(dtype: np.dtype, key: str, elements: int) -> np.ndarray:
        if places[key].dtype != dtype or places[key].size < elements:
            raise ValueError(f"storage {brief(key)} does not hold {elements} elements of {dtype}")
        return places[key]

    file.seek(at)
    return Machine(storage, data.size).run(file)
