"""Image to image against PyTorch diffusers: pictures that start from pictures."""

import zlib

import diffusers
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations
from PIL import Image

import sdjax
from sdjax import batch, sampling
from sdjax.commands.main import main
from sdjax.pictures.picture import read

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers
SEEDS = [7, 2**40]
CALL = {"num_inference_steps": 6, "guidance_scale": 5.0, "output_type": "np"}
SAMPLERS = {
    # not PNDM and LMS, which PyTorch starts in the middle with a fault, see test_samplers
    "ddim": {},
    "dpmpp_2m": {"timestep_spacing": "trailing"},
    "dpmpp_2m_sde": {"use_karras_sigmas": True},
    "unipc": {},
    "euler": {"timestep_spacing": "linspace"},
    "euler_ancestral": {},
    "heun": {},
    "dpm2_ancestral": {},
    "lcm": {},
}


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def ours(one_level_folder):
    return sdjax.StableDiffusionPipeline.from_pretrained(one_level_folder)


@pytest.fixture(scope="module")
def theirs(one_level_folder):
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(one_level_folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", SAMPLERS)
def test_pictures_are_those_of_pytorch(ours, theirs, name):
    """Of an odd size, which is rounded down; with the posterior's noise, the initial noise and that of the steps."""
    scheduler = sampling.from_config(ours.scheduler.config, sampler=name, **SAMPLERS[name])
    theirs.scheduler = getattr(diffusers, scheduler.config["_class_name"]).from_config(dict(scheduler.config))
    call = CALL | {"image": [picture(1, 35, 50), picture(2, 35, 50)], "strength": 0.6, "prompt": ["a goose", "blue"]}
    expected = theirs(generator=generators(), **call).images
    made = ours(seed=SEEDS, noise="torch", scheduler=scheduler, **call).images
    assert made.shape == (2, 48, 32, 3)
    np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "given"),
    [("dpmpp_2m", {"timesteps": [950, 700, 480, 300, 100]}), ("euler", {"sigmas": [14.0, 6.0, 2.0, 0.7, 0.2, 0.0]})],
)
def test_given_steps_are_cut_as_those_of_a_number(ours, theirs, name, given):
    scheduler = sampling.from_config(ours.scheduler.config, sampler=name)
    theirs.scheduler = getattr(diffusers, scheduler.config["_class_name"]).from_config(dict(scheduler.config))
    call = {"guidance_scale": 5.0, "output_type": "np", "image": picture(1, 32, 48), "prompt": "blue", "strength": 0.6}
    expected = theirs(generator=generators()[0], **call, **given).images
    made = ours(seed=SEEDS[0], noise="torch", scheduler=scheduler, **call, **given).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


@pytest.mark.parametrize("family", [oracle.SDXL, oracle.REFINER], ids=["sdxl", "refiner"])
def test_sdxl(tmp_path, family):
    """Without a strength: 0.3 of the steps."""
    pytorch = oracle.pipeline(tmp_path, family)
    pytorch.save_pretrained(tmp_path / "model")
    ours = sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    theirs = diffusers.StableDiffusionXLImg2ImgPipeline(
        **{name: getattr(pytorch, name, None) for name in ("text_encoder", "tokenizer", *pytorch.components)},
        **{
            "force_zeros_for_empty_prompt": family is oracle.SDXL,
            "requires_aesthetics_score": family is oracle.REFINER,
        },
    )
    theirs.set_progress_bar_config(disable=True)
    call = CALL | {"image": [picture(1, 16, 24), picture(2, 16, 24)], "prompt": ["a goose", "blue"]}
    expected = theirs(generator=generators(), **call).images
    np.testing.assert_allclose(ours(seed=SEEDS, noise="torch", **call).images, expected, atol=1e-4)


def test_lcm(tmp_path):
    """All steps run, over the part of the noise that strength says."""
    theirs = oracle.pipeline(tmp_path, oracle.LCM)
    theirs = diffusers.LatentConsistencyModelImg2ImgPipeline(**theirs.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "model")
    ours = sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    call = CALL | {"image": [picture(1, 16, 24), picture(2, 16, 24)], "prompt": ["a goose", "blue"], "strength": 0.5}
    call |= {"num_inference_steps": 4, "guidance_scale": 8.5}
    expected = theirs(generator=generators(), **call).images
    np.testing.assert_allclose(ours(seed=SEEDS, noise="torch", **call).images, expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"num_inference_steps=4 must not exceed original_inference_steps=50 times"):
        ours(**call | {"strength": 0.05})


def test_strength_and_pictures_compile_nothing_and_vary_in_a_batch(ours):
    call = CALL | {"prompt": "a goose", "scheduler": "ddim"}
    pictures = [picture(1, 16, 16), picture(2, 16, 16)]
    ours(image=pictures, seed=[1, 2], **call)
    with compilations() as compiled:
        both = ours(image=pictures, seed=[1, 2], strength=[0.3, 0.9], **call).images
    assert compiled == []
    for own, seed, strength, expected in zip(pictures, [1, 2], [0.3, 0.9], both, strict=True):
        alone = ours(image=own, seed=seed, strength=strength, **call).images[0]
        np.testing.assert_allclose(alone, expected, atol=1e-5)
    near, far = (np.abs(made - np.asarray(own) / 255).mean() for made, own in zip(both, pictures, strict=True))
    assert near < far


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code or 0


def test_commands_and_jobs(one_level_folder, tmp_path, capsys):
    """`generate` records the picture, `--from` finds it; a job's pictures are those of the call."""
    for i in (1, 2):
        picture(i, 16, 16).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in (1, 2)]
    options = ["--model", str(one_level_folder), "--steps", "4", "--strength", "0.6"]
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert command("generate", "a goose", "--image", paths[0], *options, "--out", str(first)) == 0
    assert command("generate", "--from", str(first), "--model", str(one_level_folder), "--out", str(again)) == 0
    np.testing.assert_array_equal(Image.open(again), Image.open(first))
    assert "Denoising strength: 0.6" in Image.open(first).text["parameters"]
    job = [
        {"prompt": "a goose", "image": paths, "strength": [0.6, 0.9]},
        {"prompt": "a goose", "image": [paths[0], None]},
    ]
    with pytest.raises(ValueError, match="line 2: image: null beside pictures"):
        batch.run(job, tmp_path / "out", model=str(one_level_folder), batch=2)
    job[1] = {"prompt": "a goose", "seed": 5, "width": 16, "height": 16}
    flags = {"num_inference_steps": 4}
    batch.run([line | flags for line in job], tmp_path / "out", model=str(one_level_folder), batch=2)
    made = sorted((tmp_path / "out").rglob("*.png"))
    assert len(made) == 5
    np.testing.assert_array_equal(Image.open(made[0]), Image.open(first))
    known = read("image", paths[0]).sha256
    picture(3, 16, 16).save(paths[0])
    assert command("generate", "--from", str(first), "--model", str(one_level_folder), "--out", str(tmp_path)) == 2
    assert f"is not the picture that was used, whose SHA-256 begins with {known[:12]}" in capsys.readouterr().err


def test_latents_stand_for_their_picture(ours):
    """Latents [B h w C], without the noise of a posterior; with the little noise of one step they come back."""
    call = {"prompt": "a goose", "scheduler": "ddim", "output_type": "latent", "guidance_scale": 1.0}
    latents = oracle.normal(2, 4, 4, 4)
    made = ours(**call, image=latents, strength=0.5, seed=[3, 4], num_inference_steps=6).images
    other = ours(**call, image=latents, strength=[0.5, 0.8], seed=[3, 4], num_inference_steps=6).images
    np.testing.assert_allclose(made[0], other[0], atol=1e-5)
    assert np.abs(made[1] - other[1]).max() > 1e-2
    near = ours(**call, image=latents, strength=0.003, seed=[3, 4], num_inference_steps=500).images
    oracle.assert_close(near, latents, 0.2)


def test_what_is_no_picture(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    (tmp_path / "text.png").write_text("a goose")
    whole = tmp_path / "whole.png"
    picture(1, 64, 64).save(whole)
    (tmp_path / "damaged.png").write_bytes(whole.read_bytes()[:-200])
    for side in (10**4, 10**5):
        header = b"IHDR" + side.to_bytes(4, "big") * 2 + b"\x08\2\0\0\0"
        whole_header = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + zlib.crc32(header).to_bytes(4, "big")
        (tmp_path / f"{side}.png").write_bytes(whole_header + b"\0\0\0\0IDAT")
    cases = {
        "there is no such file": tmp_path / "none.png",
        "is no file": tmp_path,
        "is no picture that can be read": tmp_path / "text.png",
        "is animated, of 2 frames": tmp_path / "a.gif",
        "is of 10000x10000, more than 67,108,864 pixels": tmp_path / "10000.png",
        "is of more than 67,108,864 pixels": tmp_path / "100000.png",
        r"an array must be \[H W\], .* not \[3, 8, 8\]": np.zeros((3, 8, 8), np.uint8),
        "values in 0..1": np.full((8, 8, 3), 2.0),
        "uint8, or float": np.zeros((8, 8, 3), np.int32),
        "…: there is no such file": "x" * 10**4,
        "damaged.png: is damaged": tmp_path / "damaged.png",
        "must be a file, a PIL picture or an array": 5,
        "values of 32 bits": Image.new("F", (8, 8)),
        "is not the picture that was used": f"{whole}#sha256={'0' * 64}",
        "was in memory": f"#sha256={'0' * 64}",
    }
    for message, value in cases.items():
        with pytest.raises(ValueError, match=f"^image: .*{message}"):
            read("image", value)
    known = read("image", whole)
    picture(2, 64, 64).save(whole)
    with pytest.raises(ValueError, match="has changed since"):
        known.rgb()


def test_a_photograph_with_a_second_picture_is_the_first(tmp_path):
    picture(1, 16, 16).save(tmp_path / "two.jpg", "MPO", save_all=True, append_images=[picture(2, 16, 16)])
    assert read("image", tmp_path / "two.jpg").size == (16, 16)


def test_no_other_program_reads_a_file(tmp_path):
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n{} loop\n")
    with pytest.raises(ValueError, match="is no picture that can be read: PNG, JPEG"):
        read("image", tmp_path / "a.png")


def test_pictures_of_every_kind_are_upright_and_rgb(tmp_path):
    own = picture(1, 6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    own.save(tmp_path / "turned.png", exif=exif)
    turned = read("image", tmp_path / "turned.png")
    assert turned.size == turned.rgb().size == (4, 6)
    np.testing.assert_array_equal(turned.rgb(), np.rot90(own, -1))
    clear = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    assert (np.asarray(read("image", clear).rgb()) == 255).all()
    grey = Image.fromarray(np.full((4, 6), 2**15, np.uint16))
    grey.save(tmp_path / "grey.png")
    assert (np.asarray(read("image", tmp_path / "grey.png").rgb()) == 128).all()
    for mode in ("1", "L", "LA", "P", "CMYK", "YCbCr"):
        assert read("image", own.convert(mode)).rgb().mode == "RGB"
    floats = read("image", np.float32(own) / 255)
    assert floats == read("image", own) == read("image", np.asarray(own))
    assert floats != read("image", picture(2, 6, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 0.5}, "strength: only with image"),
        ({"image": picture(1, 16, 16), "strength": 0.1}, "leaves none of 6 steps"),
        ({"image": picture(1, 16, 16), "strength": 1.5}, "strength must be a finite number from 0 to 1"),
        ({"image": picture(1, 3, 16)}, "a picture of 3x16 is smaller than 4x4"),
        ({"image": [picture(1, 16, 16), picture(1, 16, 32)], "seed": [1, 2]}, "have 16x16 and 16x32"),
        ({"image": [picture(1, 16, 16), None], "seed": [1, 2]}, "all start from one, or none does"),
        ({"image": [picture(1, 16, 16)] * 3, "seed": [1, 2]}, "image: 3 values for 2 images"),
    ],
)
def test_bad_arguments(ours, arguments, message):
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        ours(**{"prompt": ["a goose"] * len(arguments.get("seed", [0])), **CALL, **arguments})
    assert compiled == []
