"""PyTorch's pickled files without PyTorch: torch.save is read alike, and what wants to run does not run."""

import collections
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
import torch

from sdjax.checkpoints import pickles
from sdjax.checkpoints.errors import CheckpointError

DTYPES = ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]
BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "stream"])


@pytest.fixture
def save(tmp_path):
    """Saves with PyTorch and gives the path."""

    def write(value, zipped: bool = True) -> Path:
        path = tmp_path / "model.ckpt"
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        return path

    return write


def assert_same(array: np.ndarray, tensor: torch.Tensor) -> None:
    assert array.shape == tuple(tensor.shape)
    assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
    np.testing.assert_array_equal(array.astype(np.float64), tensor.detach().double().numpy())


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_every_dtype(save, zipped, dtype):
    tensor = (3 * torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))).to(getattr(torch, dtype))
    loaded = pickles.load(save({"odd": torch.ones(3, dtype=torch.uint8), "a": tensor}, zipped))
    assert_same(loaded["a"], tensor)
    assert not loaded["a"].flags.writeable


@BOTH
def test_views_of_a_storage(save, zipped):
    storage = torch.arange(24.0)
    tensors = {
        "transposed": storage.reshape(4, 6).T,
        "strided": storage[3:20:4],
        "offset": storage[20:].reshape(2, 2),
        "expanded": storage[5:6].expand(3, 4),
        "channels last": storage.reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "all": storage,
        "scalar": storage[7],
        "empty": torch.zeros(0, 4),
        "empty view": storage[24:],
    }
    loaded = pickles.load(save(tensors, zipped))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(loaded[name], tensor)


@BOTH
def test_what_lies_around_tensors(save, zipped):
    value = {
        "state_dict": collections.OrderedDict(w=torch.nn.Parameter(torch.ones(2)), b=torch.zeros(1)),
        "global_step": 470000,
        "lr": [1e-4, None, True, (1, "a", b"b")],
        "set": {1, 2},
        "shape": torch.Size([1, 2]),
        "dtype": torch.float16,
        "numpy": [np.float64(0.25), np.float32(0.5), np.int64(-3), np.bool_(True)],
    }
    loaded = pickles.load(save(value, zipped))
    assert_same(loaded["state_dict"]["w"], torch.ones(2))
    assert list(loaded["state_dict"]) == ["w", "b"]
    assert repr(loaded.pop("dtype")) == "torch.float16"
    plain = {name: value[name] for name in value if name not in ("state_dict", "dtype")}
    assert {name: item for name, item in loaded.items() if name != "state_dict"} == plain


@BOTH
def test_a_state_dict_with_attributes(save, zipped):
    """Module.state_dict gives an OrderedDict with a _metadata; such attributes replace no method."""
    state = torch.nn.Linear(2, 3).state_dict()
    state.get = "no method"
    loaded = pickles.load(save(state, zipped))
    assert loaded.get("weight") is loaded["weight"]
    assert {name: array.shape for name, array in loaded.items()} == {"weight": (3, 2), "bias": (3,)}


def test_an_embedding_of_textual_inversion(save):
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, 8))})
    loaded = pickles.load(save({"string_to_token": {"*": 265}, "string_to_param": parameters}))
    assert_same(loaded["string_to_param"]["*"], torch.ones(2, 8))


class Named:
    """Pickled as a reference to a name, as classes and functions are."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Call:
    """Pickled as a call, with a state if there is one."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state

    def __reduce__(self):
        return (self.function, self.args) if self.state is None else (self.function, self.args, self.state)


def dumps(value, protocol: int = 2) -> bytes:
    """pickle.dumps, where Named stands for what it names; the stack-built names of protocol 4 from 4 on."""

    class Pickler(pickle._Pickler):
        dispatch: ClassVar = dict(pickle._Pickler.dispatch)

        def save_named(self, value: Named) -> None:
            if protocol >= 4:
                self.save(value.module)
                self.save(value.name)
                self.write(pickle.STACK_GLOBAL)
            else:
                self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())

        dispatch[Named] = save_named

        def save_reduce(self, func, args, state=None, *rest, obj=None) -> None:
            self.save(func)
            self.save(args)
            self.write(pickle.REDUCE)
            if state is not None:
                self.save(state)
                self.write(pickle.BUILD)

    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


def zip_of(path: Path, program: bytes, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return path


def stream_of(path: Path, program: bytes, keys=(), storages: bytes = b"") -> Path:
    head = [dumps(item) for item in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join([*head, program, dumps(list(keys)), storages]))
    return path


CONTAINERS = pytest.mark.parametrize("container", [zip_of, stream_of], ids=["zip", "stream"])


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        pickles.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


TENSOR = Named("torch._utils", "_rebuild_tensor_v2")


def attacks(marker: Path) -> dict:
    """name refused -> a value that would make the marker if it were loaded by pickle"""
    shell, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    return {
        "posix.system": Call(Named("posix", "system"), shell),
        "os.system": Call(Named("os", "system"), shell),
        "builtins.eval": Call(Named("builtins", "eval"), code),
        "builtins.exec": {"a": [Call(Named("builtins", "exec"), code)]},
        "__builtin__.eval": Call(Named("__builtin__", "eval"), code),
        "builtins.getattr": Call(Call(Named("builtins", "getattr"), Named("os", "path"), "os"), shell),
        "torch._utils.os.system": Call(Named("torch._utils", "os.system"), shell),
        "torch.os.system": Call(Named("torch", "os.system"), shell),
        "collections.OrderedDict.fromkeys": Call(Named("collections", "OrderedDict.fromkeys"), [1]),
        "torch._utils._rebuild_tensor_v2.__globals__": Named("torch._utils", "_rebuild_tensor_v2.__globals__"),
        "subprocess.Popen": Call(Named("subprocess", "Popen"), ["touch", str(marker)]),
        "torch.load": Call(Named("torch", "load"), "other.ckpt"),
        "torch.storage._load_from_bytes": Call(Named("torch.storage", "_load_from_bytes"), pickle.dumps(1)),
        "numpy.load": Call(Named("numpy", "load"), "other.npy"),
        "numpy.core.multiarray._reconstruct": Named("numpy.core.multiarray", "_reconstruct"),
        "_codecs.decode": Call(Named("_codecs", "decode"), b"a", "rot13"),
        "pytorch_lightning.callbacks.model_checkpoint.os": Named("pytorch_lightning.callbacks.model_checkpoint", "os"),
        "sdjax.checkpoints.pickles.load": Call(Named("sdjax.checkpoints.pickles", "load"), "a"),
    }


@CONTAINERS
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", attacks(Path()))
def test_nothing_runs(tmp_path, container, protocol, name):
    marker = tmp_path / "marker"
    message = error_of(container(tmp_path / "evil.ckpt", dumps(attacks(marker)[name], protocol)))
    assert f"refused: it uses {name}, " in message
    assert "safetensors" in message
    assert not marker.exists()


def test_the_attacks_are_real(tmp_path):
    """What is refused above does run in pickle's own unpickler."""
    pickle.loads(dumps(attacks(tmp_path / "marker")["os.system"]))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_real_reduce_saved_by_torch(save, tmp_path, zipped):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'marker'}",)

    assert "posix.system" in error_of(save({"state_dict": {"a": torch.ones(2)}, "b": Evil()}, zipped))
    assert not (tmp_path / "marker").exists()


ITEMS, STORAGE = Named("collections", "OrderedDict"), Named("torch", "FloatStorage")
CALLBACK = Named("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
ODD = {
    "an admitted class called with other arguments": Call(ITEMS, 1, 2, 3),
    "a storage class called": Call(STORAGE, 4),
    "an inert class called": Call(CALLBACK),
    "a function altered": Call(TENSOR, state={"a": 1}),
    "the defaults of a function replaced": Call(Named("torch", "Size"), (), state=(None, {"__defaults__": (1,)})),
    "tensors of nothing": Call(TENSOR, None, "0", 1, 2),
    "a numpy object array": Call(Named("numpy", "dtype"), "O8", False, True),
    "a scalar of another dtype": Call(Named("numpy.core.multiarray", "scalar"), 1, b"abc"),
    "bytes by another codec": Call(Named("_codecs", "encode"), "a", "rot13"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_uses_of_admitted_names(tmp_path, name):
    assert "no weights saved by PyTorch" in error_of(zip_of(tmp_path / "odd.ckpt", dumps([ODD[name]])))


@pytest.mark.parametrize("slots", [False, True], ids=["state", "slots"])
@pytest.mark.parametrize(
    "name", [TENSOR, ITEMS, STORAGE, CALLBACK, Named("builtins", "set"), Named("torch", "float16")]
)
def test_what_is_admitted_is_never_altered(tmp_path, name, slots):
    """BUILD on the thing itself: set its attributes, in its __dict__ or by setattr."""
    before = {key: repr(vars(type(item))) for key, item in pickles.TABLE.items()}
    state = {"call": Named("builtins", "set"), "__setstate__": Named("builtins", "set")}
    program = dumps(name)[:-1] + dumps((None, state) if slots else state)[2:-1] + pickle.BUILD + pickle.STOP
    error_of(zip_of(tmp_path / "odd.ckpt", program))
    assert {key: repr(vars(type(item))) for key, item in pickles.TABLE.items()} == before
    torch.save({"a": torch.ones(2)}, tmp_path / "good.ckpt")
    assert_same(pickles.load(tmp_path / "good.ckpt")["a"], torch.ones(2))


class Pid(tuple):
    """Pickled as a persistent id."""


def tensor_of(pid: tuple, offset=0, size=(2,), stride=(1,)) -> bytes:
    """A pickle of one tensor of the storage that pid names."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, value):
            return tuple(value) if isinstance(value, Pid) else None

        dispatch: ClassVar = dict(pickle._Pickler.dispatch)

        def save_named(self, value):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())

        dispatch[Named] = save_named

    file = io.BytesIO()
    pickler = Pickler(file, 2)
    pickler.write(pickle.PROTO + b"\x02")
    pickler.save(TENSOR)
    pickler.save((Pid(pid), offset, size, stride, False, None))
    pickler.write(pickle.REDUCE + pickle.STOP)
    return file.getvalue()


FOUR = struct.pack("<4f", 1, 2, 3, 4)
PID = ("storage", STORAGE, "0", "cpu", 4)


def in_zip(path: Path, program: bytes) -> Path:
    return zip_of(path, program, **{"data/0": FOUR})


def in_stream(path: Path, program: bytes) -> Path:
    return stream_of(path, program, ["0"], struct.pack("<q", 4) + FOUR)


WITH_STORAGE = pytest.mark.parametrize("container", [in_zip, in_stream], ids=["zip", "stream"])


@WITH_STORAGE
def test_a_tensor_built_by_hand(tmp_path, container):
    path = container(tmp_path / "a.ckpt", tensor_of(PID, 1, (2,), (2,)))
    np.testing.assert_array_equal(pickles.load(path), [2, 4])


@WITH_STORAGE
@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (3, (2,), (1,)),
        (0, (5,), (1,)),
        (0, (2, 2), (3, 1)),
        (4, (), ()),
        (-1, (2,), (1,)),
        (0, (-2,), (1,)),
        (3, (2,), (-1,)),
        (0, (2,), (1, 1)),
        (2**62, (2,), (1,)),
        (0, (2**40, 2**40), (0, 1)),
        (0, (2,), (2**62,)),
        (0, (1.5,), (1,)),
        ("0", (2,), (1,)),
    ],
)
def test_no_tensor_reads_other_memory(tmp_path, container, offset, size, stride):
    assert "a tensor of" in error_of(container(tmp_path / "a.ckpt", tensor_of(PID, offset, size, stride)))


@WITH_STORAGE
@pytest.mark.parametrize(
    "pid",
    [
        ("storage", STORAGE, "0", "cpu", 5),
        ("storage", STORAGE, "0", "cpu", -1),
        ("storage", STORAGE, "0", "cpu", 2**62),
        ("storage", Named("torch", "DoubleStorage"), "0", "cpu", 4),
        ("storage", STORAGE, "../0", "cpu", 4),
        ("storage", STORAGE, 0, "cpu", 4),
        ("storage", Named("torch", "float16"), "0", "cpu", 4),
        ("module", STORAGE, "0", "cpu", 4),
        ("storage", STORAGE, "0", "cpu", 4, ("0", 1, 2)),
        ("storage",),
    ],
)
def test_no_storage_goes_past_its_end(tmp_path, container, pid):
    error_of(container(tmp_path / "a.ckpt", tensor_of(pid)))


@BOTH
def test_a_truncated_file(save, zipped):
    path = save({"a": torch.ones(100), "b": torch.nn.Parameter(torch.zeros(3, 4))}, zipped)
    content = path.read_bytes()
    for kept in (0, 1, 3, 4, 40, len(content) // 3, len(content) // 2, len(content) - 100, len(content) - 1):
        path.write_bytes(content[:kept])
        assert "truncated, or no weights saved by PyTorch" in error_of(path)


@pytest.mark.parametrize("content", [b"\x80\x02}.", b"PK\x03\x04", b"<html>", b"\x00" * 1000, pickle.dumps({"a": 1})])
def test_no_file_of_pytorch(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    assert "no weights saved by PyTorch" in error_of(tmp_path / "a.pt")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        pickles.load(tmp_path / "a.pt")


def rewritten(path: Path, change) -> Path:
    """The zip with its entries changed by change(name, content) -> (name, content), or left out for None."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for entry in filter(None, (change(*entry) for entry in entries)):
            archive.writestr(*entry)
    return path


ZIPS = {
    "big-endian": lambda name, content: (name, b"big" if name.endswith("byteorder") else content),
    "a short storage": lambda name, content: (name, content[:-1] if name.endswith("data/0") else content),
    "no storage": lambda name, content: None if name.endswith("data/0") else (name, content),
    "a storage of another name": lambda name, content: (name.replace("data/0", "../data/0"), content),
    "no program": lambda name, content: None if name.endswith("data.pkl") else (name, content),
}


@pytest.mark.parametrize("kind", ZIPS)
def test_a_zip_that_is_not_right(save, kind):
    error_of(rewritten(save({"a": torch.ones(100)}), ZIPS[kind]))


def test_two_programs_in_a_zip(save):
    path = save({"a": torch.ones(100)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", dumps({"a": 1}))
    error_of(path)


def test_a_compressed_zip(save):
    path = save({"a": torch.ones(100)})
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in entries:
            archive.writestr(*entry)
    assert "compressed" in error_of(path)


def test_sizes_and_places_that_a_zip_lies_about(save):
    """Bytes of the central directory overwritten: whatever they say, no error but ours, and nothing past the end."""
    path = save({"a": torch.arange(4.0)})
    content = path.read_bytes()
    start = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))
    for at in range(start, start + 46):
        for byte in (0x00, 0x7F, 0xFF):
            path.write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
            try:
                array = pickles.load(path)["a"]
            except CheckpointError:
                continue
            assert array.shape == (4,)
            assert array.tobytes() in path.read_bytes()


def test_a_model_of_torchscript_is_refused(tmp_path):
    program = dumps(Call(Named("__torch__.torch.nn.modules.linear", "Linear")))
    assert "it uses __torch__.torch.nn.modules.linear.Linear," in error_of(zip_of(tmp_path / "a.pt", program))


@BOTH
def test_a_tensor_is_read_where_it_is_looked_at(save, zipped):
    """Arrays are views of the mapped file: what is written there later is what they say."""
    path = save({"a": torch.full((1000,), 3.0)}, zipped)
    loaded = pickles.load(path)["a"]
    content = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(content.index(struct.pack("<2f", 3, 3)))
        file.write(struct.pack("<f", 7))
    assert loaded[0] == 7
    assert loaded[1] == 3


def test_storages_that_are_not_aligned(tmp_path):
    values = np.arange(4).astype(ml_dtypes.bfloat16)
    for name in ("a" * i for i in range(1, 5)):
        program = tensor_of(("storage", Named("torch", "BFloat16Storage"), "0", "cpu", 4), 0, (4,))
        path = zip_of(tmp_path / "a.ckpt", program, **{f"data/{name}": b"", "data/0": values.tobytes()})
        np.testing.assert_array_equal(pickles.load(path).astype(np.float32), [0, 1, 2, 3])
