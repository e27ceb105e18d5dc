"""sdjax.batch.manifest: a Parquet dataset that any reader of Parquet can read."""

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest

from sdjax.batch import manifest

SETTINGS = {
    "prompt": "a goose 🦢",
    "negative_prompt": None,
    "seed": 2**64 - 1,
    "sampler": "euler",
    "num_inference_steps": 25,
    "guidance_scale": 7.5,
    "width": 48,
    "height": 32,
    "loras": {"b.safetensors": 0.5, "a.safetensors": -1.0},
    "dtype": "float32",
}


def row(index, file=None, **changed):
    known = {
        "id": f"{index:020x}",
        "index": index,
        "nsfw": None,
        "seconds": 0.25,
        "file": file or f"images/{index}.png",
        "bytes": 100,
        "sha256": "0" * 64,
        "sdjax": "1",
        "jax": "2",
        "fingerprint": "f",
    }
    return manifest.row(SETTINGS | {"seed": 2**64 - 1 - index}, **known | changed)


@pytest.fixture(params=["file", "memory"])
def place(request, tmp_path):
    fs = fsspec.filesystem(request.param)
    fs.makedirs(f"{tmp_path}/manifest", exist_ok=True)
    return fs, str(tmp_path)


def test_a_part_says_all_of_its_pictures(tmp_path):
    (tmp_path / "part.parquet").write_bytes(manifest.dump([row(0), row(1, nsfw=True)]))
    first, second = pyarrow.parquet.read_table(tmp_path / "part.parquet").to_pylist()
    assert first["seed"] == 2**64 - 1 and first["prompt"] == "a goose 🦢" and first["negative_prompt"] is None
    assert first["loras"] == [("a.safetensors", -1.0), ("b.safetensors", 0.5)]
    assert '"dtype": "float32"' in first["settings"]
    assert (first["clip_skip"], first["nsfw"], second["nsfw"], second["index"]) == (None, None, True, 1)


def test_equal_rows_give_equal_bytes():
    assert manifest.dump([row(0), row(1)]) == manifest.dump([row(0), row(1)])
    assert manifest.dump([row(0)]) != manifest.dump([row(1)])


def test_an_altered_part_is_found():
    data = manifest.dump([row(0), row(1)])
    assert [found["index"] for found in manifest.load(data)] == [0, 1]
    for position in range(0, len(data), 11):
        altered = bytearray(data)
        altered[position] ^= 0x10
        assert manifest.load(bytes(altered)) is None
    assert all(manifest.load(data[:length]) is None for length in range(0, len(data), 97))


def test_a_part_of_an_earlier_version_is_a_part(place, monkeypatch):
    """Of one that knew fewer settings: a job that it began goes on."""
    fs, root = place
    with monkeypatch.context() as earlier:
        earlier.setattr(manifest, "SETTINGS", [column for column in manifest.SETTINGS if "interval" not in column[0]])
        fs.pipe_file(f"{root}/{manifest.part('aa')}", manifest.dump([row(0), row(1)]))
    fs.pipe_file(f"{root}/{manifest.part('bb')}", manifest.dump([row(2, cache_interval=3)]))
    assert [found["index"] for found in manifest.load(fs.cat_file(f"{root}/{manifest.part('aa')}"))] == [0, 1]
    assert manifest.read(fs, root)["cache_interval"].to_pylist() == [None, None, 3]


def test_another_table_is_no_part():
    file = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table({"index": [1]}), file)
    assert manifest.load(file.getvalue().to_pybytes()) is None


def test_the_parts_are_one_table_in_the_order_of_the_job(place):
    fs, root = place
    fs.pipe_file(f"{root}/{manifest.part('aa')}", manifest.dump([row(2), row(3)]))
    fs.pipe_file(f"{root}/{manifest.part('bb')}", manifest.dump([row(0), row(1)]))
    fs.pipe_file(f"{root}/manifest/.sdjax-0123456789abcdef.tmp", b"half a part")
    assert manifest.chunks(fs, root) == {"aa", "bb"}
    table = manifest.read(fs, root)
    assert table["index"].to_pylist() == [0, 1, 2, 3]
    assert set(manifest.VARYING) < set(table.column_names)


def test_before_the_first_chunk_there_is_an_empty_table(place):
    fs, root = place
    for folder in (root, f"{root}/nowhere"):
        assert manifest.read(fs, folder).schema == manifest.schema()
        assert manifest.summary(manifest.read(fs, folder)) == {
            "pictures": 0,
            "nsfw": 0,
            "files": 0,
            "bytes": 0,
            "seconds": 0,
        }


def test_a_damaged_part_is_named(place):
    fs, root = place
    fs.pipe_file(f"{root}/{manifest.part('aa')}", b"PAR1 is not enough PAR1")
    with pytest.raises(ValueError, match="manifest/aa"):
        manifest.read(fs, root)


def test_a_shard_counts_once():
    rows = [row(0, file="shards/a.tar", nsfw=True), row(1, file="shards/a.tar", nsfw=False), row(2)]
    table = pa.Table.from_pylist(rows, schema=manifest.schema())
    assert manifest.summary(table) == {"pictures": 3, "nsfw": 1, "files": 2, "bytes": 200, "seconds": 0.75}


def test_a_path_with_bytes_that_are_no_utf8():
    own = manifest.row(SETTINGS | {"loras": {"a\udcff": 1.0}}, **{k: row(0)[k] for k in ("id", "index", "seconds")})
    assert own["loras"] == [(r"a\udcff", 1.0)] and own["settings"].encode()
