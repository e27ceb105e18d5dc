"""Pictures and captions: read, checked, cut, put into batches."""

import collections
import io
import itertools
import json
import tarfile

import drawn
import jax
import numpy as np
import pytest
from PIL import Image

from sdjax.pictures.picture import read as read_picture
from sdjax.training.data import buckets, captions, examples, folders, pixels, shards
from sdjax.training.data.batches import Group, Shown, batches, bucketed, fixed_crop, from_number
from sdjax.training.data.buckets import Crop
from sdjax.training.data.examples import DataError, Example, Found
from sdjax.training.data.known import Known
from sdjax.training.data.store import Store, key_of


def listed(found):
    return [(one.path.name, one.caption, one.repeats) for one in found]


def test_captions_are_beside_pictures_in_the_names_of_folders_or_missing(tmp_path):
    drawn.folder(tmp_path / "5_sks dog", ((8, 8), (8, 8)))
    (tmp_path / "5_sks dog" / "1.txt").unlink()
    (tmp_path / "deeper" / "still").mkdir(parents=True)
    drawn.picture(0).save(tmp_path / "deeper" / "still" / "a.JPG", "jpeg")
    (tmp_path / "deeper" / "still" / "a.caption").write_text("\ufeffa\n goose")
    drawn.picture(0).save(tmp_path / "z.webp")
    (tmp_path / ".hidden.png").write_bytes(b"")
    assert listed(folders.read(tmp_path)) == [
        ("0.png", "picture 0, red, blue", 5),
        ("1.png", "sks dog", 5),
        ("a.JPG", "a goose", 1),
        ("z.webp", None, 1),
    ]


def test_metadata_lists_pictures_captions_pairs_and_masks(tmp_path):
    lines = [
        {"file_name": "a.png", "text": "a\ngoose"},
        {"file_name": "in/b.png", "caption": "b", "conditioning_image_file_name": "c.png", "mask": "m.png"},
        {"file_name": "d.png", "text": None},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert folders.read(tmp_path) == [
        Found(tmp_path / "a.png", "a goose"),
        Found(tmp_path / "in/b.png", "b", tmp_path / "c.png", tmp_path / "m.png"),
        Found(tmp_path / "d.png", None),
    ]


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", "{}", '{"file_name": 3}', '{"file_name": "../a.png"}', '{"file_name": "/a.png"}', "[" * 100_000],
)
def test_metadata_that_cannot_be_read_is_listed_by_lines(tmp_path, text):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n' + text)
    with pytest.raises(DataError, match="1 lines cannot be read:\nline 2: "):
        folders.read(tmp_path)


def test_a_folder_without_pictures_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="no pictures in it"):
        folders.read(tmp_path)


def test_all_that_is_wrong_is_listed_with_names_and_counts(tmp_path):
    drawn.folder(tmp_path, ((40, 40), (3, 3), (40, 40), (40, 40)))
    (tmp_path / "0.txt").unlink()
    (tmp_path / "2.png").write_bytes(b"no picture")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:200])
    with pytest.raises(DataError) as error:
        examples.checked(folders.read(tmp_path), where="pictures", least=8)
    first, *lines = str(error.value).splitlines()
    assert first.startswith("pictures: of 4 pictures 1 without a caption, 1 too small, 2 not readable: captions are in")
    assert [line.partition(": ")[0] for line in lines] == ["without a caption", "too small", *["not readable"] * 2]
    assert lines[1].endswith("1.png (3x3; the shorter side needs 8 pixels)")
    assert "2.png: is no picture" in lines[2] and "3.png: is damaged" in lines[3]


def test_a_caption_for_all_that_have_none_and_pairs_that_lack(tmp_path):
    drawn.folder(tmp_path, ((40, 40), (40, 40)))
    (tmp_path / "0.txt").unlink()
    found = examples.checked(folders.read(tmp_path), where="", caption="a goose")
    assert [example.caption for example in found] == ["a goose", "picture 1, red, blue"]
    with pytest.raises(DataError, match="2 without a conditioning image"):
        examples.checked(folders.read(tmp_path), where="", caption="a goose", paired=True)
    with pytest.raises(DataError, match=r"of 2 pictures 2 too small:\ntoo small: .*40x40; the shorter side needs 41"):
        examples.check_sizes(found, 41, "")


def test_pictures_that_are_known_are_not_read_again(tmp_path, monkeypatch):
    listed = folders.read(drawn.folder(tmp_path / "pictures"))
    path = tmp_path / "cache" / "known.json"
    found = examples.checked(listed, where="", known=Known(path))
    drawn.picture(9, (50, 60)).save(listed[1].path)
    read, asked = read_picture, []
    monkeypatch.setattr("sdjax.pictures.picture.read", lambda name, value: asked.append(value) or read(name, value))
    again = examples.checked(listed, where="", known=Known(path))
    assert asked == [listed[1].path] and again[1].picture.size == (50, 60)
    assert [one for one in again if one not in found] == [again[1]]
    assert again[0].picture.rgb() == drawn.picture(0)
    for damaged in ("{", "[]", '{"a": 1}', '{"a": [1, 2]}'):
        path.write_text(damaged)
        assert examples.checked(listed, where="", known=Known(path)) == again


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png(seed):
    file = io.BytesIO()
    drawn.picture(seed).save(file, "png")
    return file.getvalue()


def test_shards_are_copied_to_a_folder_once(tmp_path):
    tar_of(
        tmp_path / "s-0.tar", [("a.png", png(0)), ("a.txt", b"goose"), ("b.png", png(1)), ("b.json", b'{"prompt":"x"}')]
    )
    tar_of(tmp_path / "s-1.tar", [("a.png", png(2)), ("a.conditioning.png", png(3)), ("a.caption", b"duck")])
    folder = shards.local(f"{tmp_path}/s-{{0..1}}.tar", tmp_path / "cache")
    assert [(one.caption, one.control is not None) for one in folders.read(folder)] == [
        ("goose", False),
        ("x", False),
        ("duck", True),
    ]
    assert (folder / "00000002.png").read_bytes() == png(2)
    (tmp_path / "s-1.tar").unlink()
    assert shards.local(f"{tmp_path}/s-{{0..1}}.tar", tmp_path / "cache") == folder


def test_shards_that_cannot_be_read_leave_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        shards.local(f"{tmp_path}/none.tar", tmp_path / "cache")
    tar_of(tmp_path / "s.tar", [("a.txt", b"goose")])
    with pytest.raises(DataError, match=r"s.tar: a: has no picture"):
        shards.local(f"{tmp_path}/s.tar", tmp_path / "cache")
    assert not [*(tmp_path / "cache" / "copies").iterdir()]


def test_a_folder_at_a_url_is_copied(tmp_path):
    import fsspec

    fs = fsspec.filesystem("memory")
    for name, data in (("a.png", png(0)), ("in/b.jpg", png(1)), ("in/b.txt", b"b"), ("model.ckpt", b"no")):
        fs.pipe_file(f"/set/{name}", data)
    folder = shards.local("memory://set", tmp_path / "cache")
    assert listed(folders.read(folder)) == [("a.png", None, 1), ("b.jpg", "b", 1)]
    assert not (folder / "model.ckpt").exists()
    with pytest.raises(FileNotFoundError):
        shards.local("memory://nothing", tmp_path / "cache")


def test_what_a_file_system_raises_names_the_data(tmp_path, monkeypatch):
    def fails(*_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", fails)
    with pytest.raises(OSError, match=r"^s3://bucket/set: Install s3fs to access S3$"):
        shards.local("s3://bucket/set", tmp_path)


@pytest.mark.parametrize(("resolution", "multiple", "step"), [(512, 8, 64), (1024, 8, 64), (128, 8, 16), (32, 4, 4)])
def test_buckets_are_multiples_and_no_larger_than_the_square(resolution, multiple, step):
    assert buckets.step_of(resolution, multiple) == step
    found = buckets.sizes(resolution, step)
    assert (resolution, resolution) in found
    assert all(width % step == height % step == 0 and width * height <= resolution**2 for width, height in found)
    assert {(height, width) for width, height in found} == {*found}


def test_a_picture_goes_to_the_bucket_of_its_shape():
    found = buckets.sizes(512, 64)
    assert buckets.nearest((1000, 1000), found) == (512, 512)
    assert buckets.nearest((1600, 1200), found) == (576, 448)
    assert buckets.nearest((100, 5000), found) == (256, 1024)


def test_a_crop_covers_its_bucket():
    assert buckets.crop((300, 150), (64, 64)) == Crop((64, 64), (300, 150), (128, 64), 32, 0)
    assert buckets.crop((150, 300), (64, 64), (0, 1)) == Crop((64, 64), (150, 300), (64, 128), 0, 64)
    crop = buckets.crop((300, 150), (64, 64), (0.25, 0.25))
    assert crop.time_ids() == (150, 300, 0, 16, 64, 64)
    assert crop.time_ids(mirrored=True) == (150, 300, 0, 48, 64, 64)


def test_pixels_are_cut_and_mirrored():
    image = Image.fromarray(np.arange(8, dtype=np.uint8)[None].repeat(4, 0))
    crop = Crop((4, 4), (8, 4), (8, 4), 2, 0)
    assert pixels.cut(image, crop)[0, :, 0].tolist() == [2, 3, 4, 5]
    assert pixels.cut(image, crop, mirrored=True)[0, :, 0].tolist() == [5, 4, 3, 2]


def test_masks_are_of_a_file_or_of_what_is_not_transparent(tmp_path):
    image = drawn.picture(0, (8, 8)).convert("RGBA")
    alpha = Image.new("L", (8, 8), 255)
    alpha.paste(0, (0, 0, 4, 8))
    image.putalpha(alpha)
    image.save(tmp_path / "a.png")
    drawn.picture(1, (8, 8)).save(tmp_path / "m.png")
    example = Example(read_picture("", tmp_path / "a.png"), "")
    mask = pixels.cut(pixels.mask_of(example), Crop((8, 8), (8, 8), (8, 8), 0, 0))
    assert pixels.mask_of_latents(mask, 4)[..., 0].tolist() == [[0, 1], [0, 1]]
    own = Example(example.picture, "", mask=read_picture("", tmp_path / "m.png"))
    assert pixels.mask_of(own) == drawn.picture(1, (8, 8)).convert("L")


def test_captions_are_dropped_and_shuffled():
    chance = np.random.default_rng(0)
    seen = [captions.seen("a, b,c, d", chance, shuffle=True, keep=1, empty=0.25) for _ in range(400)]
    assert 60 < seen.count("") < 140
    assert {*seen} - {""} == {", ".join(["a", *order]) for order in itertools.permutations("bcd")}
    assert captions.seen("a, b,c", chance) == "a, b,c"
    assert captions.sentence(captions.OBJECT, "<cat>", chance).count("<cat>") == 1


def test_a_store_keeps_arrays_and_mends_itself(tmp_path):
    store, key = Store(tmp_path), key_of("a", 1)
    assert key != key_of("a", 2) and key not in store
    store.put(key, {"x": np.float32([1, 2])})
    assert key in store
    np.testing.assert_array_equal(store.get(key)["x"], np.float32([1, 2]))
    store.path(key).write_bytes(store.path(key).read_bytes()[:30])
    with pytest.raises(OSError, match="damaged, and removed"):
        store.get(key)
    assert key not in store


class Ids:
    """In place of a tokenizer: the number of a caption."""

    def __call__(self, texts):
        return np.array([[int(text.split()[1].strip(",")) if text else -1] for text in texts])


@pytest.fixture
def found(tmp_path):
    drawn.folder(tmp_path)
    return examples.checked(folders.read(tmp_path), where="")


def shown(**options):
    return Shown(lambda text, chance: text, None, None, {"text_encoder": Ids()}, has_time_ids=True, **options)


def test_small_buckets_are_merged_into_the_nearest(found):
    sizes = buckets.sizes(32, 4)
    assert [len(own) for own in bucketed(found, sizes).values()] == [1, 1, 1, 1]
    assert [len(own) for own in bucketed(found, sizes, 100).values()] == [4]
    twice = [Example(one.picture, "", repeats=2) for one in found]
    assert [len(own) for own in bucketed(twice, sizes, 2).values()] == [1, 1, 1, 1]
    assert all(len(own) > 1 for own in bucketed(found, sizes, 2).values())


def test_batches_are_a_function_of_seed_and_number(found):
    groups = {size: [Group(own, 2)] for size, own in bucketed(found, buckets.sizes(32, 4)).items()}

    def some(seed, first, count):
        return list(itertools.islice(from_number(batches(groups, shown(flips=True), seed), first), count))

    whole, rest, other = some(7, 0, 24), some(7, 15, 9), some(8, 0, 24)
    jax.tree.map(np.testing.assert_array_equal, whole[15:], rest)
    jax.tree.map(np.testing.assert_array_equal, whole[15], batches(groups, shown(flips=True), 7)[15])
    same = [jax.tree.map(np.array_equal, *pair) for pair in zip(whole, other, strict=True)]
    assert not all(jax.tree.leaves(same))
    for batch in whole:
        height, width = batch["pixels"].shape[1:3]
        assert batch["pixels"].shape == (2, height, width, 3) and batch["pixels"].dtype == np.float32
        assert (batch["time_ids"][:, 4:] == (height, width)).all()
    turns = collections.Counter(batch["pixels"].shape for batch in whole)
    assert {*turns.values()} == {6}


def test_every_picture_is_seen_as_often_as_it_counts(found):
    twice = [Example(one.picture, one.caption, repeats=1 + place) for place, one in enumerate(found)]
    data = batches({(32, 32): [Group(twice, 2)]}, shown(), 0)
    seen = [int(number) for step in range(50) for number in data[step]["input_ids"]["text_encoder"][:, 0]]
    assert [seen.count(number) for number in range(4)] == [10, 20, 30, 40]
    orders = {tuple(seen[first : first + 10]) for first in range(0, 100, 10)}
    assert len(orders) > 5


@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 1), (3, 7)])
def test_any_number_of_pictures_and_any_size_of_a_batch(found, count, size):
    data = batches({(32, 32): [Group(found[:count], size)], (24, 40): [Group(found[:1], size)]}, shown(), 0)
    assert len(data) > 10**9
    assert {data[step]["pixels"].shape for step in range(10)} == {(size, 32, 32, 3), (size, 40, 24, 3)}


def test_groups_stand_one_after_the_other_with_their_weights(found):
    groups = [Group(found[:2], 2, 2.0), Group(found[2:], 3, 0.5)]
    batch = batches({(32, 32): groups}, shown(has_weights=True), 0)[4]
    assert batch["weights"].tolist() == [2, 2, 0.5, 0.5, 0.5]
    ids = batch["input_ids"]["text_encoder"][:, 0]
    assert {*ids[:2].tolist()} <= {0, 1} and {*ids[2:].tolist()} <= {2, 3}


def test_crops_are_anywhere_or_where_the_hash_of_a_picture_puts_them(found):
    wide = found[1]
    lefts = {fixed_crop(wide, (32, 32), center=center).left for center in (True, False) for _ in range(3)}
    assert len(lefts) == 2 and 16 in lefts
    chance = np.random.default_rng(0)
    drawn_lefts = {shown().crop(wide, (32, 32), chance).left for _ in range(20)}
    assert len(drawn_lefts) > 5


def test_masks_and_control_pictures_are_cut_as_their_picture_is(tmp_path):
    own = examples.checked(folders.read(drawn.pairs(tmp_path)), where="", paired=True)
    arrays = shown(mask_factor=4).arrays(own[0], (32, 24), 1.0, np.random.default_rng(0))
    assert arrays["control_image"].shape == arrays["pixels"].shape == (24, 32, 3)
    assert 0 <= arrays["control_image"].min() <= arrays["control_image"].max() <= 1
    assert arrays["mask"].shape == (6, 8, 1) and (arrays["mask"] == 1).all()
