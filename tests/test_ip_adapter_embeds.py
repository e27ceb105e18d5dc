"""Embeddings of IP-Adapters' pictures against PyTorch diffusers: taken out, given, read from files."""

import diffusers
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations
from safetensors.torch import save_file
from test_image_to_image import CALL, SEEDS, generators, picture
from test_ip_adapter import CLASSES, FAMILIES, VISION, adapter, flat, image_encoder

import sdjax
from sdjax import sampling

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # of diffusers' schedulers
    pytest.mark.filterwarnings("ignore:.*requires torchvision"),
]
KINDS = {"one level": ["plain", "plus"], "sdxl": ["plus"]}
SHOWN = [[picture(1, 30, 24), picture(2, 24, 60)], [picture(3, 16, 16)]]
BOTH = CALL | {"prompt": ["a goose", "blue"], "height": 48, "width": 32}
ONE = CALL | {"prompt": "a goose", "scheduler": "ddim", "height": 16, "width": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a pipeline, and that of its IP-Adapters."""
    made = {}

    def folders(name):
        if name not in made:
            family, folder = FAMILIES[name], tmp_path_factory.mktemp(name)
            image_encoder(VISION).save_pretrained(folder / "image_encoder")
            for i, kind in enumerate(KINDS[name]):
                save_file(flat(adapter(kind, family, i)), folder / f"{kind}.safetensors")
            made[name] = oracle.save_pipeline(folder, family), folder
        return made[name]

    return folders


def loaded(pipe, folder, kinds, **options):
    names = [f"{kind}.safetensors" for kind in kinds]
    pipe.load_ip_adapter(str(folder), [""] * len(kinds), names, **options)
    return pipe


@pytest.fixture(scope="module")
def plain(folders):
    """Our pipeline with a plain IP-Adapter and no image encoder. Read only."""
    model, folder = folders("one level")
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(model)
    return loaded(pipe, folder, ["plain"], image_encoder_folder=None)


@pytest.mark.parametrize(("family", "guidance_scale"), [("one level", 5.0), ("one level", 1.0), ("sdxl", 5.0)])
def test_they_are_pytorchs(folders, family, guidance_scale):
    """Of several adapters and several pictures, and the pictures that are made of them."""
    (model, folder), kinds = folders(family), KINDS[family]
    shown, is_guided = SHOWN[: len(kinds)], guidance_scale > 1
    ours = loaded(sdjax.StableDiffusionPipeline.from_pretrained(model), folder, kinds)
    checked = {} if family == "sdxl" else {"safety_checker": None}
    theirs = loaded(CLASSES[family].from_pretrained(model, **checked), folder, kinds)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs.prepare_ip_adapter_image_embeds(shown, None, "cpu", 1, is_guided)
    made = ours.prepare_ip_adapter_image_embeds(shown, is_guided)
    for own, other in zip(made, expected, strict=True):
        oracle.assert_close(own, other.detach().numpy())
    scheduler = sampling.from_config(ours.scheduler.config, sampler="ddim")
    theirs.scheduler = diffusers.DDIMScheduler.from_config(dict(scheduler.config))
    theirs.set_ip_adapter_scale([0.7] * len(kinds))
    both = BOTH | {"guidance_scale": guidance_scale}
    reference = theirs(generator=generators(), ip_adapter_image_embeds=expected, **both).images
    call = both | {"seed": SEEDS, "noise": "torch", "scheduler": scheduler, "ip_adapter_scale": 0.7}
    pictures = ours(ip_adapter_image_embeds=expected, **call).images
    np.testing.assert_allclose(pictures, reference, atol=1e-4)
    np.testing.assert_allclose(ours(ip_adapter_image=shown, **call).images, reference, atol=1e-4)


def test_files_and_a_pipeline_without_an_image_encoder(plain, folders, tmp_path):
    """As users of PyTorch diffusers save them, and of NumPy; one for all images, or one for each of them."""
    alone = plain
    model, folder = folders("one level")
    seeing = loaded(sdjax.StableDiffusionPipeline.from_pretrained(model), folder, ["plain"])
    [embeds] = seeing.prepare_ip_adapter_image_embeds(SHOWN[1])
    tensor = torch.from_numpy(embeds)
    torch.save([tensor], tmp_path / "face.ipadpt")
    torch.save(tensor, tmp_path / "face.pt")
    np.save(tmp_path / "face.npy", embeds)
    save_file({"0": tensor}, tmp_path / "face.safetensors")
    expected = seeing(ip_adapter_image=SHOWN[1], **ONE).images
    with compilations() as compiled:
        for given in (embeds, [tensor], *(tmp_path / f"face.{end}" for end in ("ipadpt", "pt", "npy", "safetensors"))):
            np.testing.assert_array_equal(alone(ip_adapter_image_embeds=given, **ONE).images, expected)
    assert compiled == []
    [other] = seeing.prepare_ip_adapter_image_embeds(SHOWN[0][0])
    each = np.stack([embeds[0], other[0], embeds[1], other[1]])
    made = alone(ip_adapter_image_embeds=each, seed=[0, 1], **ONE).images
    np.testing.assert_allclose(made[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(made[1], seeing(ip_adapter_image=SHOWN[0][0], seed=1, **ONE).images[0], atol=1e-5)


def test_with_a_second_pass(plain):
    """Which has them as well."""
    embeds = np.abs(oracle.normal(2, 1, VISION["projection_dim"]))
    call = ONE | {"hires_scale": 2.0, "ip_adapter_image_embeds": embeds}
    assert plain(**call).images.shape == (1, 32, 32, 3)


FACE = {"proj.0": (32, 16), "proj.2": (2 * 24, 32)}


def face_adapter(seed: int) -> dict[str, torch.Tensor]:
    """An IP-Adapter FaceID of two tokens, with its LoRA of rank 3."""
    generator = torch.Generator().manual_seed(seed)
    plain = flat(adapter("plain", oracle.ATTENDING, seed))
    tensors = {name: value for name, value in plain.items() if "ip_adapter" in name}
    shapes = {f"image_proj.{name}.weight": shape for name, shape in FACE.items()}
    shapes |= {f"image_proj.{name}.bias": shape[:1] for name, shape in FACE.items()}
    unet = oracle.unet(oracle.ATTENDING.unet)
    for i, name in enumerate(unet.attn_processors):
        layer = unet.get_submodule(name.removesuffix(".processor"))
        for part, linear in zip(
            ("q", "k", "v", "out"), (layer.to_q, layer.to_k, layer.to_v, layer.to_out[0]), strict=True
        ):
            lora = f"ip_adapter.{i}.to_{part}_lora"
            shapes |= {f"{lora}.down.weight": (3, linear.in_features), f"{lora}.up.weight": (linear.out_features, 3)}
    tensors |= {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    return tensors | {
        "image_proj.norm.weight": 1 + tensors["image_proj.proj.2.bias"][:24],
        "image_proj.norm.bias": torch.zeros(24),
    }


def test_faces(folders, tmp_path):
    """FaceID: embeddings of two faces and a LoRA, which goes with the adapter."""
    model, _ = folders("one level")
    save_file(face_adapter(3), tmp_path / "face.safetensors")
    ours = sdjax.StableDiffusionPipeline.from_pretrained(model)
    before = ours(**ONE).images
    loaded(ours, tmp_path, ["face"])
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    loaded(theirs, tmp_path, ["face"], image_encoder_folder=None).set_progress_bar_config(disable=True)
    scheduler = sampling.from_config(ours.scheduler.config, sampler="ddim")
    theirs.scheduler = diffusers.DDIMScheduler.from_config(dict(scheduler.config))
    theirs.set_ip_adapter_scale(0.7)
    face = torch.from_numpy(oracle.normal(1, 2, 1, 16))
    embeds = [torch.cat([torch.zeros_like(face), face])]
    expected = theirs(generator=generators(), ip_adapter_image_embeds=embeds, **BOTH).images
    call = BOTH | {"seed": SEEDS, "noise": "torch", "scheduler": scheduler, "ip_adapter_scale": 0.7}
    made = ours(ip_adapter_image_embeds=embeds, **call).images
    np.testing.assert_allclose(made, expected, atol=1e-4)
    ours.set_loras({})
    assert np.abs(ours(ip_adapter_image_embeds=embeds, **call).images - made).max() > 0.01
    with pytest.raises(ValueError, match="insightface makes of faces; give ip_adapter_image_embeds"):
        ours(ip_adapter_image=picture(1, 16, 16), **ONE)
    loaded(ours, tmp_path, ["face"])
    np.testing.assert_array_equal(ours(ip_adapter_image_embeds=embeds, **call).images, made)
    ours.unload_ip_adapter()
    np.testing.assert_array_equal(ours(**ONE).images, before)


def test_a_file_of_faces_is_no_model(tmp_path):
    save_file(face_adapter(3), tmp_path / "face.safetensors")
    with pytest.raises(sdjax.CheckpointError, match=r"an IP-Adapter, no model: .* give this file to load_ip_adapter"):
        sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / "face.safetensors")


def test_files_of_faces_that_do_not_fit(folders, tmp_path):
    ours = sdjax.StableDiffusionPipeline.from_pretrained(folders("one level")[0])
    tensors = face_adapter(3)
    wrong = {
        "an IP-Adapter FaceID Plus, which needs insightface": {"image_proj.perceiver_resampler.proj_in.weight": 4},
        "the LoRA in it does not fit this UNet: .*attn1.to_q.weight": {"ip_adapter.0.to_q_lora.up.weight": 4},
        "the LoRA in it does not fit this UNet: block 50.attn1.to_q": {"ip_adapter.100.to_q_lora.up.weight": 4},
    }
    wrong = {message: {name: torch.zeros(n, n) for name, n in more.items()} for message, more in wrong.items()}
    name = "ip_adapter.0.to_q_lora.up.weight"
    wrong["the LoRA in it is not finite .*attn1.to_q.weight"] = {name: tensors[name] * float("nan")}
    for message, more in wrong.items():
        save_file(tensors | more, tmp_path / "face.safetensors")
        with pytest.raises(sdjax.CheckpointError, match=message):
            loaded(ours, tmp_path, ["face"])
        assert ours.ip_adapters == ()
        assert ours.loras is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ip_adapter_image": picture(1, 16, 16)}, "this pipeline has no image encoder; give ip_adapter_image_embeds"),
        ({"ip_adapter_image_embeds": [np.ones((2, 1, 20))] * 2}, "of 2 IP-Adapters; this pipeline has 1"),
        ({"ip_adapter_image_embeds": np.ones((2, 1, 8))}, r"must have shape \[any, any, 20\], not \[2, 1, 8\]"),
        ({"ip_adapter_image_embeds": np.ones((1, 1, 20))}, "1 of them; with guidance, as many beside the negative"),
        ({"ip_adapter_image_embeds": np.ones((6, 1, 20)), "seed": [1, 2]}, "3 values for 2 images; give 1 or 2"),
        (
            {"ip_adapter_image_embeds": np.ones((2, 1, 20)), "ip_adapter_image": picture(1, 16, 16)},
            "ip_adapter_image: not with ip_adapter_image_embeds",
        ),
        ({}, "ip_adapter_image: pictures for 0 IP-Adapters; this pipeline has 1"),
        ({"ip_adapter_image_embeds": np.ones((2, 0, 20))}, "ip_adapter_image_embeds: of no picture"),
        ({"ip_adapter_image_embeds": np.ones((2, 1, 20), complex)}, "embeds must be an array of numbers: of complex"),
        ({"ip_adapter_image_embeds": {"a": 1}}, "ip_adapter_image_embeds must be an array of numbers: float"),
        ({"ip_adapter_image_embeds": torch.ones(2, 1, 20).to_sparse()}, "embeds must be an array of numbers: can't"),
        ({"ip_adapter_image_embeds": torch.ones(2, 1, 20, device="meta")}, "must be an array of numbers: Cannot"),
    ],
)
def test_bad_arguments(plain, arguments, message):
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        plain(**ONE, **arguments)
    assert compiled == []


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


NO_ARRAYS = {
    "other.npy": b"no array",
    "empty.npy": b"",
    "huge.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000000, 20)}\n"),
    "objects.npy": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n"),
    "syntax.npy": npy("{'descr': '<f4', 'shape': ((((((\n"),
}


def test_bad_files(plain, tmp_path):
    torch.save({"a": 1}, tmp_path / "a.ipadpt")
    for name, content in NO_ARRAYS.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "archive", np.ones(3))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    messages = {name: f"{name}: no array" for name in (*NO_ARRAYS, "archive.npy")}
    for name, message in (("a.ipadpt", "neither a tensor nor a list"), *messages.items()):
        with pytest.raises(sdjax.CheckpointError, match=message):
            plain(**ONE, ip_adapter_image_embeds=tmp_path / name)
    with pytest.raises(FileNotFoundError):
        plain(**ONE, ip_adapter_image_embeds=tmp_path / "c.ipadpt")
    with pytest.raises(ValueError, match="this pipeline has no image encoder"):
        plain.prepare_ip_adapter_image_embeds(picture(1, 16, 16))


def test_embeddings_with_guidance_are_not_those_of_two_images_without(plain):
    """The first of which would be the negative prompt's."""
    width = plain.ip_adapter.config.image_channels
    embeds = np.stack([np.zeros((1, width)), np.ones((1, width))]).astype(np.float32)
    with pytest.raises(ValueError, match="ip_adapter_image_embeds: the first half is zeros"):
        plain(["a goose", "a swan"], ip_adapter_image_embeds=embeds, guidance_scale=1, num_inference_steps=1)
