"""ControlNet-Union against PyTorch diffusers: pictures of several types for one network, types as data, files."""

import json
import warnings

import diffusers
import jax
import numpy as np
import oracle
import pytest
from compilations import compilations
from PIL import Image
from test_controlnet import SHARED, compared, controlnet
from test_image_to_image import CALL, SEEDS, command, picture
from test_inpainting import mask

import sdjax
from sdjax import batch, components
from sdjax.checkpoints import single_file
from sdjax.models import ControlNetUnionModel

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers
CONFIG = {"conditioning_embedding_out_channels": (4, 6), "num_trans_channel": 16, "num_proj_channel": 16}
CONFIG |= {"num_trans_head": 4, "num_trans_layer": 2, "num_control_type": 8}
TEXT_TO_IMAGE = diffusers.StableDiffusionXLControlNetUnionPipeline


def union(seed: int) -> diffusers.ControlNetUnionModel:
    shared = {name: oracle.XL_ONE_LEVEL.unet[name] for name in SHARED if name in oracle.XL_ONE_LEVEL.unet}
    return oracle.randomised(diffusers.ControlNetUnionModel(**shared | CONFIG), seed)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a pipeline, and that of its networks."""
    folder = tmp_path_factory.mktemp("union")
    for seed in (0, 1):
        union(seed + 5).save_pretrained(folder / f"net{seed}")
    return oracle.save_pipeline(folder, oracle.XL_ONE_LEVEL), folder


@pytest.fixture(scope="module")
def ours(folders):
    return sdjax.StableDiffusionPipeline.from_pretrained(folders[0], controlnet=folders[1] / "net0")


def theirs(folders, kind, nets=1):
    networks = [diffusers.ControlNetUnionModel.from_pretrained(folders[1] / f"net{i}") for i in range(nets)]
    pipe = kind.from_pretrained(folders[0], controlnet=networks[0] if nets == 1 else networks)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same(pipe, other):
    """Their ControlNets."""
    assert pipe.controlnets == other.controlnets
    for name in pipe.controlnets:
        assert type(getattr(pipe, name)) is type(getattr(other, name))
        jax.tree.map(np.testing.assert_array_equal, pipe.params[name], other.params[name])


CASES = [
    ("ddim", [3], {"controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.6}),
    ("euler", [0, 7], {"controlnet_conditioning_scale": [0.6, 1.2]}),
    ("ddim", [5, 5], {"guidance_scale": 1.0, "guess_mode": True, "control_guidance_end": [0.3, 0.6]}),
]


@pytest.mark.parametrize(("name", "modes", "options"), CASES)
def test_pictures_are_those_of_pytorch(folders, ours, name, modes, options):
    """One or two pictures, which two images share."""
    shown = [picture(i, 33, 49) for i in range(len(modes))]
    both = CALL | {"prompt": ["a goose", "blue"], "control_mode": modes, "control_image": shown} | options
    scheduler, expected = compared(ours, theirs(folders, TEXT_TO_IMAGE), name, {}, both)
    made = ours(seed=SEEDS, noise="torch", scheduler=scheduler, **both).images
    assert made.shape == expected.shape
    np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_with_a_picture_to_start_from(folders, ours, kind):
    own = [picture(i, 32, 48) for i in (1, 2)]
    both = CALL | {"prompt": ["a goose", "blue"], "image": own, "strength": 0.6, "control_image": [picture(3, 32, 48)]}
    both |= {"control_mode": [6], "controlnet_conditioning_scale": 0.8}
    kept, size = {}, {}
    if kind == "Inpaint":
        both["mask_image"] = [mask("half", 32, 48)] * 2
        kept, size = {"keep_unmasked": False}, {"height": 48, "width": 32}
    pytorch = theirs(folders, getattr(diffusers, f"StableDiffusionXLControlNetUnion{kind}Pipeline"))
    scheduler, expected = compared(ours, pytorch, "ddim", size, both)
    made = ours(seed=SEEDS, noise="torch", scheduler=scheduler, **both, **kept).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_two_networks(folders, tmp_path):
    """Each of them is shown one picture; they are saved as PyTorch saves them (and does not open them by itself)."""
    paths = [folders[1] / "net0", folders[1] / "net1"]
    both = sdjax.StableDiffusionPipeline.from_pretrained(folders[0], controlnet=paths)
    pytorch = theirs(folders, TEXT_TO_IMAGE, 2)
    call = CALL | {"prompt": "a goose", "control_mode": [1, 4], "control_image": [picture(i, 32, 48) for i in (1, 2)]}
    call |= {"controlnet_conditioning_scale": [0.5, 0.8], "control_guidance_end": [1.0, 0.5]}
    scheduler, expected = compared(both, pytorch, "ddim", {}, call | {"num_images_per_prompt": 2})
    made = both(seed=SEEDS, noise="torch", scheduler=scheduler, num_images_per_prompt=2, **call).images
    np.testing.assert_allclose(made, expected, atol=1e-4)
    both.save_pretrained(tmp_path / "ours")
    pytorch.save_pretrained(tmp_path / "theirs")
    entries = []
    for name in ("ours", "theirs"):
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        entries.append((index["_class_name"], index["controlnet"]))
        assert_same(sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / name), both)
    assert entries[0] == entries[1]


def test_beside_a_controlnet(folders, ours, tmp_path):
    """The Union is shown what is left. A picture of the other that weighs nothing changes nothing."""
    controlnet(oracle.XL_ONE_LEVEL, 8, conditioning_embedding_out_channels=(4, 6)).save_pretrained(tmp_path / "net")
    paths = [tmp_path / "net", folders[1] / "net0"]
    both = sdjax.StableDiffusionPipeline.from_pretrained(folders[0], controlnet=paths)
    shown = [picture(i, 16, 16) for i in range(3)]
    call = CALL | {"prompt": "a goose", "scheduler": "ddim", "control_mode": [2, 3]}
    expected = ours(control_image=shown[1:], **call).images
    made = both(control_image=shown, controlnet_conditioning_scale=[0.0, 1.0, 1.0], **call).images
    np.testing.assert_allclose(made, expected, atol=1e-5)
    assert np.abs(both(control_image=shown, **call).images - made).max() > 0.01
    both.save_pretrained(tmp_path / "both")
    assert_same(sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / "both"), both)


def test_types_are_data_and_each_image_has_its_own(ours):
    """Pictures, types and scales of each image; PyTorch's attention would mix those of a batch."""
    shown = [[picture(1, 16, 16), picture(2, 16, 16)], [picture(3, 16, 16), picture(4, 16, 16)]]
    call = CALL | {"prompt": "a goose", "scheduler": "ddim"}
    ours(control_image=shown[0], control_mode=[0, 1], seed=[1, 2], **call)
    modes, scales = [[3, 0], [7, 7]], [[0.5, 1.0], 0.7]
    with compilations() as compiled:
        both = ours(
            control_image=shown, control_mode=modes, controlnet_conditioning_scale=scales, seed=[1, 2], **call
        ).images
    assert compiled == []
    for i in range(2):
        own = {"control_image": shown[i], "control_mode": modes[i], "controlnet_conditioning_scale": scales[i]}
        np.testing.assert_allclose(ours(seed=i + 1, **own, **call).images[0], both[i], atol=1e-5)


def test_a_saved_pipeline_is_pytorchs(ours, folders, tmp_path):
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours")
        theirs(folders, TEXT_TO_IMAGE).save_pretrained(tmp_path / "theirs")
    assert type(again) is TEXT_TO_IMAGE
    assert type(again.controlnet) is diffusers.ControlNetUnionModel
    for name in ("ours", "theirs"):
        assert_same(sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / name), ours)


def test_files_as_published(folders, tmp_path):
    """A folder whose config calls it ControlNetModel; one file, of which the config is inferred."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (folders[1] / "net0").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"_class_name": "ControlNetModel"}
    (folder / "config.json").write_text(json.dumps(config))
    assert type(components.load_model("controlnet", folder, dtype=None)) is ControlNetUnionModel
    found = single_file.read(folder / "diffusion_pytorch_model.safetensors").components["controlnet"]
    assert found.config["_class_name"] == "ControlNetUnionModel"
    inferred = (*(name for name in CONFIG if name != "num_trans_head"), "addition_time_embed_dim", "block_out_channels")
    for name in inferred:
        assert found.config[name] == config[name], name
    reference = diffusers.ControlNetUnionModel.from_pretrained(folders[1] / "net0").state_dict()
    tensors = dict(found.tensors())
    assert tensors.keys() == reference.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "control_mode: a ControlNet-Union must be told the type of its picture, 0 to 7"),
        ({"control_mode": 8}, "control_mode: 8; this ControlNet-Union has the types 0 to 7"),
        ({"control_mode": [1, 2]}, "control_mode: 2 types; a ControlNet-Union is shown 1 pictures"),
        ({"control_mode": "a"}, "control_mode must be a whole number, from 0 to 63, not 'a'"),
        (
            {"control_mode": [[1]], "control_image": [[picture(1, 16, 16)] * 2]},
            "1 types; a ControlNet-Union is shown 2",
        ),
        ({"control_mode": 1, "control_image": None}, "control_image: 0 pictures; this pipeline has 1 ControlNet"),
        (
            {
                "control_image": [[picture(1, 16, 16)], [picture(1, 16, 16)] * 2],
                "control_mode": [[1], [1, 2]],
                "seed": [1, 2],
            },
            "all pictures of a batch have as many",
        ),
    ],
)
def test_bad_arguments(ours, arguments, message):
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        ours("a goose", **CALL | {"control_image": picture(1, 16, 16)} | arguments)
    assert compiled == []


def test_the_command(folders, tmp_path):
    """A picture of it is made again from its settings, and by a job."""
    paths = [str(tmp_path / f"{i}.png") for i in (0, 1)]
    for i, path in enumerate(paths):
        picture(i, 16, 16).save(path)
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    options = ["--model", str(folders[0]), "--controlnet", str(folders[1] / "net0"), "--steps", "2"]
    options += ["--control-image", paths[0], "--control-image", paths[1], "--control-mode", "3,0"]
    assert command("generate", "a goose", *options, "--out", str(first)) == 0
    assert command("generate", "--from", str(first), "--out", str(again)) == 0
    np.testing.assert_array_equal(Image.open(again), Image.open(first))
    line = {"prompt": "a goose", "control_image": [paths], "control_mode": "3,0", "num_inference_steps": 2}
    batch.run([line | {"guidance_scale": 5.0}], tmp_path / "out", model=folders[0], controlnet=folders[1] / "net0")
    [made] = (tmp_path / "out").rglob("*.png")
    assert np.abs(np.asarray(Image.open(made), int) - np.asarray(Image.open(first), int)).max() <= 1
