"""ControlNets against PyTorch diffusers: pictures, several at once, schedules, folders."""

import warnings
from dataclasses import replace
from functools import partial

import diffusers
import numpy as np
import oracle
import pytest
import safetensors.torch
import torch
from compilations import compilations
from PIL import Image
from test_image_to_image import CALL, SEEDS, command, generators, picture
from test_inpainting import mask

import sdjax
from sdjax import batch, components, sampling
from sdjax.checkpoints import folder, ldm
from sdjax.checkpoints.folder import variables
from sdjax.models import ControlNetModel, UNet2DConditionModel
from sdjax.pictures import preprocessors

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers
ORIGINAL = {
    *(f"input_hint_block.{n}.weight" for n in range(0, 15, 2)),
    *(f"zero_convs.{n}.0.weight" for n in range(6)),
    *(
        "middle_block_out.0.bias",
        "input_blocks.0.0.weight",
        "input_blocks.1.1.norm.weight",
        "input_blocks.3.0.op.weight",
    ),
    *("input_blocks.5.0.in_layers.2.weight", "middle_block.1.proj_in.weight", "time_embed.2.bias"),
}
"""Names in the original layout of a ControlNet of two levels of two layers"""
HINT = {"conditioning_embedding_out_channels": (4, 6, 8)}
SHARED = ("block_out_channels", "down_block_types", "layers_per_block", "norm_num_groups", "cross_attention_dim")
SHARED += ("attention_head_dim", "transformer_layers_per_block", "use_linear_projection", "addition_embed_type")
SHARED += ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
FAMILIES = {
    "sd1": (oracle.SD1, diffusers.StableDiffusionControlNetPipeline, HINT),
    "one level": (oracle.ONE_LEVEL, diffusers.StableDiffusionControlNetPipeline, HINT),
    "sd2": (oracle.SD2, diffusers.StableDiffusionControlNetPipeline, {"conditioning_embedding_out_channels": (4, 6)}),
    "sdxl": (
        oracle.SDXL,
        diffusers.StableDiffusionXLControlNetPipeline,
        {"conditioning_embedding_out_channels": (4, 6)},
    ),
}
IMAGE_TO_IMAGE = {
    "one level": diffusers.StableDiffusionControlNetImg2ImgPipeline,
    "sdxl": diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
}
INPAINTING = {
    "one level": diffusers.StableDiffusionControlNetInpaintPipeline,
    "sdxl": diffusers.StableDiffusionXLControlNetInpaintPipeline,
}


def controlnet(family, seed: int, **config) -> diffusers.ControlNetModel:
    shared = {name: family.unet[name] for name in SHARED if name in family.unet}
    return oracle.randomised(diffusers.ControlNetModel(**shared | config), seed)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a pipeline and those of its ControlNets."""
    made = {}

    def folders(name, **options):
        key = (name, *options.items())
        if key not in made:
            family, _, config = FAMILIES[name]
            folder = tmp_path_factory.mktemp(name)
            nets = [controlnet(family, seed, **config | options) for seed in (5, 6)]
            for i, net in enumerate(nets):
                net.save_pretrained(folder / f"net{i}")
            made[key] = oracle.save_pipeline(folder, family), folder
        return made[key]

    return folders


@pytest.fixture(scope="module")
def loaded(folders):
    """Our pipeline, with one ControlNet or several."""
    made = {}

    def loaded(name, nets=1, **options):
        key = (name, nets, *options.items())
        if key not in made:
            model, folder = folders(name, **options)
            own = folder / "net0" if nets == 1 else [folder / f"net{i}" for i in range(nets)]
            made[key] = sdjax.StableDiffusionPipeline.from_pretrained(model, controlnet=own)
        return made[key]

    return loaded


@pytest.fixture(scope="module")
def pair(folders, loaded):
    """Our pipeline, and PyTorch's of a class, with one ControlNet or several."""

    def pair(name, kind, nets=1, **options):
        model, folder = folders(name, **options)
        theirs = [diffusers.ControlNetModel.from_pretrained(folder / f"net{i}") for i in range(nets)]
        checked = {} if name == "sdxl" else {"safety_checker": None}
        pytorch = kind.from_pretrained(model, controlnet=theirs[0] if nets == 1 else theirs, **checked)
        pytorch.set_progress_bar_config(disable=True)
        return loaded(name, nets, **options), pytorch

    return pair


def compared(ours, theirs, name, given, both):
    """given: by PyTorch's names."""
    scheduler = sampling.from_config(ours.scheduler.config, sampler=name)
    theirs.scheduler = getattr(diffusers, scheduler.config["_class_name"]).from_config(dict(scheduler.config))
    expected = theirs(generator=generators(), **given, **both).images
    return scheduler, expected


CASES = [
    ("sd1", "ddim", {}),
    ("sd1", "euler_ancestral", {"controlnet_conditioning_scale": 0.6, "control_guidance_end": 0.6}),
    ("sd1", "heun", {"control_guidance_start": 0.3}),
    ("sd1", "dpmpp_2m", {"guess_mode": True}),
    ("sd2", "dpmpp_2m", {"control_guidance_start": 0.1, "control_guidance_end": 0.8}),
    ("sdxl", "euler", {"controlnet_conditioning_scale": 0.7}),
    ("sdxl", "dpmpp_2m_sde", {"guess_mode": True}),
]


@pytest.mark.parametrize(("family", "name", "options"), CASES)
def test_pictures_are_those_of_pytorch(pair, family, name, options):
    """Two pictures, each with its control, of a size that is rounded down."""
    ours, theirs = pair(family, FAMILIES[family][1])
    shown = [picture(1, 33, 49), picture(2, 33, 49)]
    both = CALL | options | {"prompt": ["a goose", "blue"]}
    scheduler, expected = compared(ours, theirs, name, {"image": shown}, both)
    made = ours(control_image=shown, seed=SEEDS, noise="torch", scheduler=scheduler, **both).images
    assert made.shape == expected.shape
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_several_at_once(pair):
    ours, theirs = pair("one level", FAMILIES["one level"][1], nets=2)
    shown = [picture(1, 32, 48), picture(2, 32, 48)]
    both = CALL | {"prompt": "a goose", "controlnet_conditioning_scale": [0.5, 0.8], "control_guidance_end": [1.0, 0.5]}
    both["control_guidance_start"] = [0.0, 0.1]
    scheduler, expected = compared(ours, theirs, "ddim", {"image": shown}, both | {"num_images_per_prompt": 2})
    made = ours(
        control_image=shown, seed=SEEDS, noise="torch", scheduler=scheduler, num_images_per_prompt=2, **both
    ).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["one level", "sdxl"])
def test_with_a_picture_to_start_from(pair, family):
    ours, theirs = pair(family, IMAGE_TO_IMAGE[family])
    own, shown = [picture(i, 32, 48) for i in (1, 2)], [picture(i, 32, 48) for i in (3, 4)]
    both = CALL | {"prompt": ["a goose", "blue"], "image": own, "strength": 0.6, "control_image": shown}
    both["controlnet_conditioning_scale"] = 0.8
    scheduler, expected = compared(ours, theirs, "euler", {}, both)
    made = ours(seed=SEEDS, noise="torch", scheduler=scheduler, **both).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["one level", "sdxl"])
def test_with_a_mask(pair, family):
    ours, theirs = pair(family, INPAINTING[family])
    own, shown = [picture(i, 32, 48) for i in (1, 2)], [picture(i, 32, 48) for i in (3, 4)]
    both = CALL | {"prompt": ["a goose", "blue"], "image": own, "mask_image": [mask("half", 32, 48)] * 2}
    both |= {"strength": 0.7, "control_image": shown, "controlnet_conditioning_scale": 0.8}
    size = {"height": 48, "width": 32}
    scheduler, expected = compared(ours, theirs, "ddim", size, both)
    made = ours(seed=SEEDS, noise="torch", scheduler=scheduler, keep_unmasked=False, **both).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_residuals_that_are_averaged(pair):
    """`global_pool_conditions`, which also means guess mode, and colours in the order blue, green, red."""
    options = {"global_pool_conditions": True, "controlnet_conditioning_channel_order": "bgr"}
    ours, theirs = pair("one level", FAMILIES["one level"][1], **options)
    both = CALL | {"prompt": ["a goose", "blue"], "controlnet_conditioning_scale": 0.5}
    shown = [picture(1, 32, 48), picture(2, 32, 48)]
    scheduler, expected = compared(ours, theirs, "ddim", {"image": shown}, both)
    made = ours(control_image=shown, seed=SEEDS, noise="torch", scheduler=scheduler, **both).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_one_of_sdxl_that_reads_the_text_states_alone(pair):
    options = {"addition_embed_type": None, "projection_class_embeddings_input_dim": None}
    ours, theirs = pair("sdxl", FAMILIES["sdxl"][1], **options)
    both, shown = CALL | {"prompt": ["a goose", "blue"]}, [picture(1, 32, 48), picture(2, 32, 48)]
    scheduler, expected = compared(ours, theirs, "ddim", {"image": shown}, both)
    made = ours(control_image=shown, seed=SEEDS, noise="torch", scheduler=scheduler, **both).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_nothing_compiles_and_each_image_has_its_own(loaded):
    ours = loaded("one level")
    shown = [picture(i, 16, 16) for i in (1, 2)]
    call = CALL | {"prompt": "a goose", "scheduler": "ddim", "seed": [1, 2]}
    ours(control_image=shown[0], **call)
    each = {
        "controlnet_conditioning_scale": [0.5, 1.5],
        "control_guidance_end": [0.5, 1.0],
        "guess_mode": [True, False],
    }
    with compilations() as compiled:
        both = ours(control_image=shown, **call, **each).images
    assert compiled == []
    for i in range(2):
        own = {name: values[i] for name, values in each.items()}
        alone = ours(control_image=shown[i], **call | {"seed": i + 1}, **own).images[0]
        np.testing.assert_allclose(alone, both[i], atol=1e-5)
    free = ours(control_image=shown, **call, controlnet_conditioning_scale=0.0).images
    plain = sdjax.StableDiffusionPipeline(
        ours.text_encoder, ours.unet, ours.vae, ours.tokenizer, ours.scheduler, ours.mesh
    )
    np.testing.assert_allclose(free, plain(**call, height=16, width=16).images, atol=1e-5)
    assert np.abs(free - both).max() > 0.02


def test_regions_are_controlled_by_regions(pair):
    """padding_mask_crop cuts the control picture as it does the picture, as in PyTorch."""
    ours, theirs = pair("one level", INPAINTING["one level"])
    own, shown, spot = picture(1, 64, 48), picture(2, 64, 48), np.zeros((48, 64), np.uint8)
    spot[10:30, 20:40] = 255
    both = CALL | {"prompt": "a goose", "image": own, "mask_image": Image.fromarray(spot), "padding_mask_crop": 4}
    both |= {"control_image": shown, "height": 48, "width": 32, "strength": 0.7, "output_type": "pil"}
    scheduler = sampling.from_config(ours.scheduler.config, sampler="ddim")
    theirs.scheduler = diffusers.DDIMScheduler.from_config(dict(scheduler.config))
    both["controlnet_conditioning_scale"] = 1.0
    expected = np.asarray(theirs(generator=generators()[0], **both).images[0], float)
    made = np.asarray(ours(seed=SEEDS[0], noise="torch", scheduler=scheduler, **both).images[0], float)
    assert np.abs(made - expected).mean() < 0.3
    with pytest.raises(ValueError, match="control_image: must have the size of image"):
        ours(**both | {"control_image": picture(2, 32, 32)})


def test_guess_mode_with_more_branches(loaded):
    """All branches that read the prompt are controlled: with one of weight 0 beside it the picture is the same."""
    ours = loaded("one level")
    call = CALL | {"scheduler": "ddim", "control_image": picture(1, 16, 16), "guess_mode": True}
    np.testing.assert_allclose(
        ours("a goose AND blue:0", **call).images, ours("blue:0 AND a goose", **call).images, atol=1e-4
    )


def test_kept_features(loaded):
    """DeepCache with a ControlNet: an interval of 1 is the whole network."""
    ours = loaded("sd1")
    call = CALL | {"prompt": "a goose", "scheduler": "ddim", "control_image": picture(1, 16, 16)}
    whole = ours(**call).images
    np.testing.assert_allclose(ours(**call, cache_interval=1).images, whole, atol=1e-5)
    assert 0 < np.abs(ours(**call, cache_interval=3).images - whole).max() < 0.5


def test_preprocessors(pair):
    """The network is shown the edges of a picture; for inpainting, -1 where it is made anew, as PyTorch's users do."""
    ours, theirs = pair("one level", INPAINTING["one level"])
    call = CALL | {"prompt": "a goose", "scheduler": "ddim"}
    edges = preprocessors.canny(picture(1, 16, 16))
    made = ours(control_image=picture(1, 16, 16), control_preprocessor="canny", **call).images
    np.testing.assert_array_equal(made, ours(control_image=edges, **call).images)
    own, half = picture(2, 32, 48), mask("half", 32, 48)
    both = CALL | {"prompt": "a goose", "image": own, "mask_image": half, "strength": 0.7}
    both["controlnet_conditioning_scale"] = 0.5
    shown = np.where(np.asarray(half)[..., None] > 127, -1, np.float32(own) / 255)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(dict(ours.scheduler.config))
    scheduler = sampling.from_config(dict(theirs.scheduler.config))
    expected = theirs(control_image=oracle.nchw(shown[None]), generator=generators()[0], height=48, width=32, **both)
    inpainted = both | {"control_image": own, "control_preprocessor": "inpaint", "keep_unmasked": False}
    made = ours(seed=SEEDS[0], noise="torch", scheduler=scheduler, **inpainted).images
    np.testing.assert_allclose(made, expected.images, atol=1e-4)


@pytest.mark.parametrize("nets", [1, 2])
def test_a_saved_pipeline_is_pytorchs(pair, tmp_path, nets):
    ours, theirs = pair("one level", FAMILIES["one level"][1], nets=nets)
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours", safety_checker=None)
        theirs.save_pretrained(tmp_path / "theirs")
    assert type(again) is type(theirs)
    assert type(again.controlnet) is type(theirs.controlnet)
    call = CALL | {"prompt": "a goose", "num_inference_steps": 2, "scheduler": "ddim"}
    shown = [picture(i, 16, 16) for i in range(nets)]
    made = [ours(control_image=shown, **call).images]
    for name in ("ours", "theirs"):
        loaded = sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / name)
        assert loaded.controlnets == ours.controlnets
        made.append(loaded(control_image=shown, **call).images)
    np.testing.assert_array_equal(made[0], made[1])
    np.testing.assert_array_equal(made[0], made[2])


@pytest.mark.parametrize(
    ("nets", "arguments", "message"),
    [
        (1, {}, "control_image: 0 pictures; this pipeline has 1 ControlNet: one for each"),
        (2, {"control_image": picture(1, 16, 16)}, "control_image: 1 pictures; this pipeline has 2"),
        (1, {"control_image": [[picture(1, 16, 16)] * 2]}, "control_image: 2 pictures; this pipeline has 1"),
        (1, {"control_image": 3}, "control_image: must be a file, a PIL picture or an array"),
        (2, {"control_image": [picture(1, 16, 16)] * 2, "control_guidance_end": [1, 1, 1]}, "end: 3 values for 2"),
        (
            1,
            {"control_image": picture(1, 16, 16), "control_guidance_end": 0.2, "control_guidance_start": 0.5},
            "control_guidance_start, 0.5, must be below control_guidance_end, 0.2",
        ),
        (1, {"control_image": picture(1, 16, 16), "controlnet_conditioning_scale": -1}, "from 0 to 1e"),
        (1, {"control_image": picture(1, 16, 16), "control_preprocessor": "cany"}, "'cany' is none of canny, lineart"),
        (
            1,
            {"control_image": picture(1, 16, 16), "control_preprocessor": "inpaint"},
            "inpaint needs image, and mask_image or outpaint",
        ),
    ],
)
def test_bad_arguments(loaded, nets, arguments, message):
    ours = loaded("one level", nets=nets)
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        ours("a goose", **CALL, **arguments)
    assert compiled == []


def test_arrays_are_as_lists(loaded):
    """With several ControlNets, a value for each of them."""
    ours = loaded("one level", nets=2)
    shown = [picture(i, 16, 16) for i in (1, 2)]
    call = CALL | {"prompt": ["a goose"] * 2, "scheduler": "ddim", "seed": [1, 2]}
    made = ours(control_image=shown, controlnet_conditioning_scale=[0.5, 0.8], **call).images
    arrays = {"control_image": np.stack(shown), "controlnet_conditioning_scale": np.array([0.5, 0.8])}
    np.testing.assert_array_equal(ours(**arrays, **call).images, made)


def test_a_job_is_checked_before_it_starts(loaded, tmp_path):
    """What a line asks of networks and of the UNet."""
    ours = loaded("one level")
    shown = str(tmp_path / "shown.png")
    picture(1, 16, 16).save(shown)
    wrong = {
        "hires_strength": 0.5,
        "pag_applied_layers": "mid,up",
        "freeu": [1, 2, 3],
        "image_guidance_scale": 1.5,
        "prompt_2": "blue",
        "original_size": "16x16",
        "ip_adapter_scale": 0.5,
        "depth_map": shown,
        "prompt": "a AND b",
    }
    for name, value in wrong.items():
        line = {"prompt": "a goose", "control_image": shown, "guidance_interval": "0.3:5"} | {name: value}
        job = [{"prompt": "a goose", "control_image": shown}, line]
        with pytest.raises(ValueError, match=f"nothing was started:\nline 2: .*{name}"):
            batch.run(job, tmp_path / "out", model=ours)
    fits = {"image": shown, "mask_image": shown, "control_image": shown, "control_preprocessor": "inpaint"}
    done = batch.run([{"prompt": "a goose", "num_inference_steps": 2} | fits], tmp_path / "out", model=ours)
    assert done.made == 1


def test_a_control_picture_without_a_controlnet(sd1_folder):
    ours = sdjax.StableDiffusionPipeline.from_pretrained(sd1_folder)
    with pytest.raises(ValueError, match="control_image: this pipeline has no ControlNet; load it with controlnet="):
        ours("a goose", control_image=picture(1, 16, 16), **CALL)
    with pytest.raises(ValueError, match="guess_mode: only with a ControlNet"):
        ours("a goose", guess_mode=True, **CALL)


@pytest.mark.parametrize("given", ["", picture(1, 16, 16), 3])
def test_what_is_no_controlnet(sd1_folder, given):
    with pytest.raises(ValueError, match="controlnet: must be a path, a Hub id or a model, not"):
        sdjax.StableDiffusionPipeline.from_pretrained(sd1_folder, controlnet=given)


def test_a_controlnet_of_another_family(folders):
    model, _ = folders("sd1")
    _, other = folders("sdxl")
    with pytest.raises(sdjax.CheckpointError, match="addition_embed_type of controlnet, text_time, are not the UNet's"):
        sdjax.StableDiffusionPipeline.from_pretrained(model, controlnet=other / "net0")


def test_the_network(folders):
    """Its residuals for two texts a picture are those of PyTorch, for each of them."""
    _, folder = folders("sd1")
    reference = diffusers.ControlNetModel.from_pretrained(folder / "net0").requires_grad_(False)
    model = ControlNetModel.from_pretrained(folder / "net0")
    x, shown, texts = oracle.normal(2, 8, 6, 4), np.abs(oracle.normal(2, 32, 24, 3)) % 1, oracle.normal(4, 7, 24)
    embedded = model.embed_picture(shown)
    residuals = oracle.run(model, x, np.float32([3, 900]), texts, picture=embedded)
    twice = [torch.from_numpy(np.concatenate([v, v])) for v in (np.moveaxis(x, -1, 1), np.moveaxis(shown, -1, 1))]
    down, middle = reference(
        twice[0].contiguous(),
        torch.tensor([3, 900] * 2),
        torch.from_numpy(texts),
        twice[1].contiguous(),
        return_dict=False,
    )
    for ours, theirs in zip(residuals, [*down, middle], strict=True):
        repeated = np.concatenate([ours] * (4 // len(ours)))
        oracle.assert_close(repeated, oracle.nhwc(theirs))


def test_commands_and_jobs(folders, tmp_path):
    """`generate` records networks and pictures, `--from` finds them; a job's pictures are those of the call."""
    model, folder_of_nets = folders("one level")
    nets, paths = [str(folder_of_nets / f"net{i}") for i in (0, 1)], [str(tmp_path / f"{i}.png") for i in (0, 1)]
    for i, path in enumerate(paths):
        picture(i, 16, 16).save(path)
    options = ["--model", str(model), "--steps", "3", "--controlnet-conditioning-scale", "0.7,0.2"]
    options += [text for i in (0, 1) for text in ("--controlnet", nets[i], "--control-image", paths[i])]
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert command("generate", "a goose", *options, "--out", str(first)) == 0
    assert command("generate", "--from", str(first), "--out", str(again)) == 0
    np.testing.assert_array_equal(Image.open(again), Image.open(first))
    job = [{"prompt": "a goose", "control_image": [paths], "controlnet_conditioning_scale": [[0.7, 0.2], 0.5]}]
    call = {"num_inference_steps": 3, "guidance_scale": 7.5}
    done = batch.run([job[0] | call], tmp_path / "out", model=model, controlnet=nets)
    assert done.made == 2
    made = [np.asarray(Image.open(path), int) for path in sorted((tmp_path / "out").rglob("*.png"))]
    ours = sdjax.StableDiffusionPipeline.from_pretrained(model, controlnet=nets)
    for scale in ([0.7, 0.2], 0.5):
        expected = ours("a goose", control_image=paths, controlnet_conditioning_scale=scale, **call).images[0]
        assert min(np.abs(own - np.asarray(expected, int)).max() for own in made) <= 1
    with pytest.raises(ValueError, match="line 1: control_image: 1 pictures; this pipeline has 2"):
        batch.run([{"prompt": "a goose", "control_image": paths}], tmp_path / "other", model=ours)


@pytest.mark.parametrize("prefix", ["control_model.", "", None])
def test_a_single_file(tmp_path, prefix):
    """In the original layout with and without its prefix, which PyTorch reads too, and in that of diffusers (None)."""
    config = oracle.SD1.unet | {"block_out_channels": (32, 64), "layers_per_block": 2, "attention_head_dim": 8}
    config |= {"norm_num_groups": 32, "cross_attention_dim": 64}
    reference = controlnet(replace(oracle.SD1, unet=config), 5, conditioning_embedding_out_channels=(4, 6, 8, 10))
    state, path = reference.state_dict(), tmp_path / "control_shuffle.safetensors"
    if prefix is not None:
        table = {ours: [theirs] for ours, theirs in ldm.read_controlnet_table(ORIGINAL).items()}
        state = {prefix + ldm.translated(name, table)[0]: value for name, value in state.items()}
        assert {name.removeprefix(prefix) for name in state} >= ORIGINAL
    safetensors.torch.save_file(state, path)
    if prefix == "control_model.":
        reference.save_pretrained(tmp_path / "folder")
        theirs = diffusers.ControlNetModel.from_single_file(path, config=str(tmp_path / "folder"))
        for name, value in reference.state_dict().items():
            np.testing.assert_array_equal(theirs.state_dict()[name], value)
    model = components.load_model("controlnet", path, dtype=None)
    assert model.config.global_pool_conditions
    own = model.config.to_dict() | {"global_pool_conditions": False, "transformer_layers_per_block": 1}
    assert own == {name: reference.config[name] for name in own}
    for name, variable in folder.variables(model).items():
        value = folder.torch_layout(name, np.asarray(variable.get_value()))
        np.testing.assert_array_equal(value, reference.state_dict()[name].numpy())


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_training_begins_with_is_pytorchs(family, tmp_path):
    """From the same UNet: all that both have, and nothing that it adds; only what sees the picture is new."""
    config, hint = FAMILIES[family][0].unet, {"conditioning_embedding_out_channels": (4, 6, 8)}
    reference = oracle.unet(config)
    theirs = diffusers.ControlNetModel.from_unet(reference, **hint)
    unet = oracle.ported(partial(UNet2DConditionModel.from_config, config), reference)
    ControlNetModel.from_unet(unet, **hint).save_pretrained(tmp_path)
    ours = diffusers.ControlNetModel.from_pretrained(tmp_path)
    assert ours.config["cross_attention_dim"] == theirs.config["cross_attention_dim"]
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, value in ours.state_dict().items():
        if not name.startswith("controlnet_cond_embedding") or name.startswith("controlnet_cond_embedding.conv_out"):
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        else:
            assert value.shape == expected[name].shape


def test_training_begins_without_layers_that_are_not_wanted():
    config = oracle.SD1.unet
    unet = oracle.ported(partial(UNet2DConditionModel.from_config, config), oracle.unet(config))
    plain = {"down_block_types": ("DownBlock2D",) * 2, "mid_block_type": "UNetMidBlock2D"}
    model = ControlNetModel.from_unet(unet, **plain)
    assert not any("attention" in name for name in variables(model))
    own, given = variables(model), variables(unet)
    np.testing.assert_array_equal(own["mid_block.resnets.0.conv1.weight"], given["mid_block.resnets.0.conv1.weight"])
