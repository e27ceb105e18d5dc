"""The manifest: a Parquet dataset of one part for each chunk, one row for each picture.

A part is written after its chunk's pictures, so a chunk is there when its part is. All columns but those of VARYING are
the same however often and wherever a job is run.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdjax.fields import encodable
from sdjax.request import FIELDS

if TYPE_CHECKING:
    import pyarrow
    from fsspec import AbstractFileSystem

FOLDER = "manifest"
SUFFIX = ".parquet"
VARYING = ("seconds",)
SEAL = re.compile(rb"sdjax\.sha256..([0-9a-f]{64})", re.DOTALL)  # a key and its value in Parquet's metadata
UNSEALED = b"0" * 64
TYPES = {int: "int32", float: "float64", bool: "bool"}
OTHERS = {
    "scheduler": ("sampler", "string"),
    "seed": ("seed", "uint64"),
    "loras": ("loras", "loras"),
    "control_image": ("control_image", "pictures"),
}
SETTINGS = (
    *(OTHERS.get(name, (name, TYPES.get(spec.kind.annotation, "string"))) for name, spec in FIELDS.items()),
    ("model", "string"),
)
"""The columns that are settings of the picture, by their names"""


def schema() -> "pyarrow.Schema":
    """id, index, the SETTINGS, `settings` (all of them as JSON), fingerprint (of the model), sdjax and jax (versions),
    file (below the target), bytes and sha256 (of that file), nsfw (null: not checked), seconds.
    """
    import pyarrow as pa

    types = {"loras": pa.map_(pa.string(), pa.float64()), "pictures": pa.list_(pa.string())}
    columns = (
        ("id", "string"),
        ("index", "int64"),
        *SETTINGS,
        ("settings", "string"),
        ("fingerprint", "string"),
        ("sdjax", "string"),
        ("jax", "string"),
        ("file", "string"),
        ("bytes", "int64"),
        ("sha256", "string"),
        ("nsfw", "bool"),
        ("seconds", "float64"),
    )
    return pa.schema([(name, types.get(kind) or pa.type_for_alias(kind)) for name, kind in columns])


def row(settings: Mapping[str, Any], **known: Any) -> dict[str, Any]:
    """A row of the settings of a picture and of what else is known of it, by the names of `schema`."""
    own = {name: settings.get(name) for name, _ in SETTINGS}
    own |= {name: _text(own[name]) for name, kind in SETTINGS if kind == "string"}
    own["control_image"] = [encodable(path) for path in settings.get("control_image") or ()]
    own["loras"] = sorted((encodable(path), weight) for path, weight in (settings.get("loras") or {}).items())
    text = json.dumps(settings, ensure_ascii=False, allow_nan=False, sort_keys=True)
    return own | {"settings": encodable(text)} | known


def _text(value: Any) -> str | None:
    """What a column of texts has: what is none is JSON."""
    return (
        value if value is None else encodable(value if isinstance(value, str) else json.dumps(value, allow_nan=False))
    )


def dump(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The rows as a Parquet file; equal rows give equal bytes.

    Its metadata has `sdjax.sha256`: the SHA-256 of the file with zeros in the place of these 64 digits.
    """
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    with parquet.ParquetWriter(file, schema(), compression="zstd") as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema()))
        writer.add_key_value_metadata({"sdjax.sha256": UNSEALED.decode()})
    return _sealed(file.getvalue())


def load(data: bytes) -> list[dict[str, Any]] | None:
    """The rows of a Parquet file; None where it is not as `dump` wrote it, if when there were fewer columns."""
    from pyarrow import parquet

    if data != _sealed(data):
        return None
    table = parquet.read_table(io.BytesIO(data))
    return table.to_pylist() if {*table.schema.names} <= {*schema().names} else None


def _sealed(data: bytes) -> bytes | None:
    """The file with the SHA-256 that it should have; None where there is no place for it."""
    *_, (start, end) = [(None, None), *(found.span(1) for found in SEAL.finditer(data))]
    if start is None:
        return None
    digest = hashlib.sha256(data[:start] + UNSEALED + data[end:]).hexdigest()
    return data[:start] + digest.encode() + data[end:]


def part(chunk: str) -> str:
    """The name, below the target, of the part of the chunk with this id."""
    return f"{FOLDER}/{chunk}{SUFFIX}"


def chunks(fs: "AbstractFileSystem", root: str) -> set[str]:
    """The ids of the chunks that have a part in the target at `root`."""
    try:
        paths = fs.ls(f"{root}/{FOLDER}", detail=False)
    except FileNotFoundError:
        return set()
    return {path.rpartition("/")[2].removesuffix(SUFFIX) for path in paths if path.endswith(SUFFIX)}


def read(fs: "AbstractFileSystem", root: str) -> "pyarrow.Table":
    """All rows of the target at `root`, in the order of the job. Raises ValueError that names a damaged part."""
    from pyarrow import dataset

    parts = [f"{root}/{part(chunk)}" for chunk in sorted(chunks(fs, root))]
    if not parts:
        return schema().empty_table()
    return dataset.dataset(parts, schema=schema(), format="parquet", filesystem=fs).to_table().sort_by("index")


def summary(table: "pyarrow.Table") -> dict[str, Any]:
    """Counts of a manifest: pictures, nsfw (flagged ones), files, bytes (of all files), seconds (of all pictures)."""
    from pyarrow import compute

    files = table.group_by("file").aggregate([("bytes", "max")])
    return {
        "pictures": len(table),
        "nsfw": compute.sum(table["nsfw"], min_count=0).as_py(),
        "files": len(files),
        "bytes": compute.sum(files["bytes_max"], min_count=0).as_py(),
        "seconds": compute.sum(table["seconds"], min_count=0).as_py(),
    }
