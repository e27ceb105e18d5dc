"""IP-Adapters against PyTorch diffusers: pictures as prompts, of several kinds, several at once."""

import json
import warnings
from dataclasses import replace

import diffusers
import numpy as np
import oracle
import pytest
import torch
import transformers
from compilations import compilations
from PIL import Image
from safetensors.torch import save_file
from test_controlnet import HINT, controlnet
from test_image_to_image import CALL, SEEDS, command, generators, picture
from test_inpainting import mask

import sdjax
from sdjax import batch, sampling
from sdjax.batch.fingerprint import fingerprint
from sdjax.models import CLIPVisionModelWithProjection
from sdjax.models.ip_adapter import HEAD
from sdjax.request import FIELDS

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # of diffusers' schedulers
    pytest.mark.filterwarnings("ignore:.*requires torchvision"),
]
FAMILIES = {"sd1": oracle.SD1, "one level": oracle.ATTENDING, "sdxl": oracle.SDXL}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "projection_dim": 20,
}
LATENTS, WIDTH, INNER = 3, 40, 2 * HEAD
KINDS = ("plain", "plus", "full")


def shapes(kind: str, context: int, image: dict = VISION) -> dict[str, tuple[int, ...]]:
    """Those of `image_proj`, by the names in published files."""
    states, embeds = image["hidden_size"], image["projection_dim"]
    if kind == "plain":
        return {**linear("proj", embeds, 4 * context), **norm("norm", context)}
    if kind == "full":
        return {**linear("proj.0", states, states), **linear("proj.2", states, context), **norm("proj.3", context)}
    found = {"latents": (1, LATENTS, WIDTH), **linear("proj_in", states, WIDTH), **linear("proj_out", WIDTH, context)}
    found |= norm("norm_out", context)
    for i in range(4):
        attention, forward = f"layers.{i}.0", f"layers.{i}.1"
        found |= {
            **norm(f"{attention}.norm1", WIDTH),
            **norm(f"{attention}.norm2", WIDTH),
            **norm(f"{forward}.0", WIDTH),
        }
        found |= {f"{attention}.to_q.weight": (INNER, WIDTH), f"{attention}.to_kv.weight": (2 * INNER, WIDTH)}
        found |= {f"{attention}.to_out.weight": (WIDTH, INNER)}
        found |= {f"{forward}.1.weight": (4 * WIDTH, WIDTH), f"{forward}.3.weight": (WIDTH, 4 * WIDTH)}
    return found


def linear(name: str, cin: int, cout: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (cout, cin), f"{name}.bias": (cout,)}


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def adapter(kind: str, family: oracle.Family, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """An IP-Adapter of random weights, as PyTorch's pickles have it."""
    context, unet = family.unet["cross_attention_dim"], oracle.unet(family.unet)
    layers = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    kv = {}
    for i, name in enumerate(layers):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        kv |= {f"{2 * i + 1}.to_{part}_ip.weight": (width, context) for part in "kv"}
    generator = torch.Generator().manual_seed(seed)

    def random(name, shape):
        noise = torch.randn(shape, generator=generator)
        return noise / shape[-1] ** 0.5 if len(shape) > 1 else 0.2 * noise + name.endswith("weight")

    halves = {"image_proj": shapes(kind, context), "ip_adapter": kv}
    return {half: {name: random(name, shape) for name, shape in own.items()} for half, own in halves.items()}


def image_encoder(config: dict) -> transformers.CLIPVisionModelWithProjection:
    return oracle.randomised(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config)), 9)


def flat(halves: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{half}.{name}": value for half, own in halves.items() for name, value in own.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a pipeline and that of its IP-Adapters, which is like those on the Hub."""
    made = {}

    def folders(name):
        if name not in made:
            family, folder = FAMILIES[name], tmp_path_factory.mktemp(name)
            image_encoder(VISION).save_pretrained(folder / "adapters" / "models" / "image_encoder")
            for seed, kind in enumerate(KINDS):
                save_file(flat(adapter(kind, family, seed)), folder / "adapters" / "models" / f"{kind}.safetensors")
            made[name] = oracle.save_pipeline(folder, family), folder / "adapters"
        return made[name]

    return folders


@pytest.fixture(scope="module")
def pair(folders):
    """Our pipeline and PyTorch's, of a class, with IP-Adapters of these kinds."""
    ours = {}

    def pair(name, kinds, cls, **components):
        model, adapters = folders(name)
        if name not in ours:
            ours[name] = sdjax.StableDiffusionPipeline.from_pretrained(model)
        checked = {} if name == "sdxl" else {"safety_checker": None}
        theirs = cls.from_pretrained(model, **checked, **components)
        theirs.set_progress_bar_config(disable=True)
        for pipe in (ours[name], theirs):
            pipe.load_ip_adapter(str(adapters), "models", [f"{kind}.safetensors" for kind in kinds])
        return ours[name], theirs

    return pair


@pytest.fixture
def ours(folders):
    model, _ = folders("one level")
    return sdjax.StableDiffusionPipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def adapted(folders):
    """With a plain IP-Adapter. Read only."""
    model, adapters = folders("one level")
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(model)
    pipe.load_ip_adapter(adapters, "models", "plain.safetensors")
    return pipe


CLASSES = dict.fromkeys(["sd1", "one level"], diffusers.StableDiffusionPipeline)
CLASSES["sdxl"] = diffusers.StableDiffusionXLPipeline
SIZE = {"height": 48, "width": 32}
BOTH = CALL | {"prompt": ["a goose", "blue"]}
ONE = CALL | {"prompt": "a goose", "scheduler": "ddim", "height": 16, "width": 16}


def compared(ours, theirs, scale, both, **given):
    """Our picture, as far from PyTorch's as that is right. given: by PyTorch's names, both: by ours as well."""
    scheduler = sampling.from_config(ours.scheduler.config, sampler="ddim")
    theirs.scheduler = diffusers.DDIMScheduler.from_config(dict(scheduler.config))
    theirs.set_ip_adapter_scale(scale)
    expected = theirs(generator=generators(), **given, **both).images
    made = ours(seed=SEEDS, noise="torch", scheduler=scheduler, ip_adapter_scale=scale, **both).images
    np.testing.assert_allclose(made, expected, atol=1e-4)
    return made


@pytest.mark.parametrize(
    ("family", "kind"), [("sd1", "plain"), *(("one level", kind) for kind in ("plus", "full")), ("sdxl", "plus")]
)
def test_pictures_are_those_of_pytorch(pair, family, kind):
    """A picture that is cropped and made smaller; those of "sdxl", "plain" are below."""
    ours, theirs = pair(family, [kind], CLASSES[family])
    made = compared(ours, theirs, 0.7, BOTH | SIZE | {"ip_adapter_image": picture(1, 50, 35)})
    call = BOTH | SIZE | {"scheduler": "ddim", "seed": SEEDS, "noise": "torch", "ip_adapter_image": picture(1, 50, 35)}
    assert np.abs(ours(**call, ip_adapter_scale=0.0).images - made).max() > 0.02


def test_several_at_once(pair):
    """Two IP-Adapters, one of which is shown two pictures; of "sdxl" below, with masks."""
    ours, theirs = pair("one level", ["plain", "plus"], CLASSES["one level"])
    shown = [[picture(1, 30, 24), picture(2, 24, 60)], [picture(3, 16, 16)]]
    compared(ours, theirs, [0.4, 1.3], BOTH | SIZE | {"ip_adapter_image": shown})


BY_BLOCK = [
    {"up": {"block_0": [0.3, 1.2]}},
    {"down": 0.5, "mid": 0.7, "up": {"block_0": 0.4}},
    {"down": {"block_1": [0.8]}},
]


@pytest.mark.parametrize("scale", BY_BLOCK)
def test_scales_by_block(pair, scale):
    """Of SDXL, whose style is in up.block_0.1; a block that is not named has 0."""
    ours, theirs = pair("sdxl", ["plus"], CLASSES["sdxl"])
    compared(ours, theirs, scale, BOTH | SIZE | {"ip_adapter_image": picture(1, 24, 24)})


def test_scales_by_block_as_json():
    spec = FIELDS["ip_adapter_scale"]
    for given in (*BY_BLOCK, 0.5, (0.5, 1), [0.5, BY_BLOCK[0]]):
        value = spec.check(given)
        assert spec.check(spec.json(value)) == value
        assert spec.check(json.loads(json.dumps(spec.json(value)))) == value
    assert spec.check(BY_BLOCK[0]) == ((("up.block_0.0", 0.3), ("up.block_0.1", 1.2)),)
    assert spec.values(BY_BLOCK) == tuple(map(spec.check, BY_BLOCK))


@pytest.mark.parametrize(("family", "kinds"), [("one level", ["plus"]), ("sdxl", ["plain", "plus"])])
def test_masks(pair, family, kinds):
    """Two pictures for the first adapter, each of which acts where its mask is white."""
    ours, theirs = pair(family, kinds, CLASSES[family])
    shown = [[picture(1, 30, 24), picture(2, 24, 60)], [picture(3, 16, 16)]][: len(kinds)]
    masks = [[mask("half", 32, 48), mask("grey", 32, 48)], [mask("half", 16, 24)]][: len(kinds)]
    processor = diffusers.image_processor.IPAdapterMaskProcessor()
    seen = [processor.preprocess(own, 48, 32).swapaxes(0, 1) for own in masks]
    both = BOTH | SIZE | {"ip_adapter_image": shown}
    scheduler = sampling.from_config(ours.scheduler.config, sampler="ddim")
    theirs.scheduler = diffusers.DDIMScheduler.from_config(dict(scheduler.config))
    theirs.set_ip_adapter_scale([0.8] * len(kinds))
    expected = theirs(generator=generators(), cross_attention_kwargs={"ip_adapter_masks": seen}, **both).images
    call = both | {"seed": SEEDS, "noise": "torch", "scheduler": scheduler, "ip_adapter_scale": 0.8}
    made = ours(ip_adapter_mask=masks, **call).images
    np.testing.assert_allclose(made, expected, atol=1e-4)
    assert np.abs(ours(**call).images - made).max() > 0.01


def test_without_guidance(pair):
    ours, theirs = pair("one level", ["plus"], CLASSES["one level"])
    compared(ours, theirs, 0.7, BOTH | SIZE | {"ip_adapter_image": picture(1, 24, 24), "guidance_scale": 1.0})


def test_with_a_picture_to_start_from(pair):
    ours, theirs = pair("one level", ["plain"], diffusers.StableDiffusionImg2ImgPipeline)
    own = {"image": [picture(i, 32, 48) for i in (1, 2)], "strength": 0.6}
    compared(ours, theirs, 0.7, BOTH | own | {"ip_adapter_image": picture(3, 24, 24)})


def test_with_perturbed_attention(pair):
    """PAG, whose branch has the pictures of the prompt's."""
    ours, theirs = pair("one level", ["plus"], diffusers.StableDiffusionPAGPipeline)
    compared(ours, theirs, 0.7, BOTH | SIZE | {"ip_adapter_image": picture(1, 24, 24), "pag_scale": 3.0})


def test_an_edited_picture(folders, tmp_path):
    """InstructPix2Pix, of whose three branches the prompt's alone has the picture."""
    edits = replace(oracle.ATTENDING, unet={**oracle.ATTENDING.unet, "in_channels": 8})
    parts = oracle.pipeline(tmp_path, edits).components
    theirs = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "model")
    ours = sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    for pipe in (ours, theirs):
        pipe.load_ip_adapter(str(folders("one level")[1]), "models", "plus.safetensors")
    own = {"image": [picture(i, 32, 48) for i in (1, 2)]}
    compared(ours, theirs, 0.7, BOTH | own | {"ip_adapter_image": picture(3, 24, 24)})


def test_with_a_controlnet(folders, pair, tmp_path):
    """Which sees the text alone."""
    controlnet(oracle.ATTENDING, 5, **HINT).save_pretrained(tmp_path)
    net = diffusers.ControlNetModel.from_pretrained(tmp_path)
    _, theirs = pair("one level", ["plus"], diffusers.StableDiffusionControlNetPipeline, controlnet=net)
    model, adapters = folders("one level")
    ours = sdjax.StableDiffusionPipeline.from_pretrained(model, controlnet=tmp_path)
    ours.load_ip_adapter(adapters, subfolder="models", weight_name="plus.safetensors")
    shown = [picture(i, 32, 48) for i in (3, 4)]
    both = BOTH | {"ip_adapter_image": picture(1, 24, 24), "controlnet_conditioning_scale": 0.8}
    scheduler = sampling.from_config(ours.scheduler.config, sampler="ddim")
    theirs.scheduler = diffusers.DDIMScheduler.from_config(dict(scheduler.config))
    theirs.set_ip_adapter_scale(0.7)
    expected = theirs(image=shown, generator=generators(), **both).images
    made = ours(
        control_image=shown, seed=SEEDS, noise="torch", scheduler=scheduler, ip_adapter_scale=0.7, **both
    ).images
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_nothing_compiles_and_each_image_has_its_own(adapted):
    shown = [picture(1, 30, 24), picture(2, 24, 24)]
    adapted(ip_adapter_image=shown[0], **ONE, seed=[1, 2])
    with compilations() as compiled:
        both = adapted(ip_adapter_image=shown, ip_adapter_scale=[0.5, 1.5], **ONE, seed=[1, 2]).images
    assert compiled == []
    for i, scale in enumerate([0.5, 1.5]):
        alone = adapted(ip_adapter_image=shown[i], ip_adapter_scale=scale, **ONE, seed=i + 1).images[0]
        np.testing.assert_allclose(alone, both[i], atol=1e-5)
    together = adapted(ip_adapter_image=[shown], **ONE, seed=1).images
    each = adapted(ip_adapter_image=[shown, shown[::-1]], **ONE, seed=[1, 2]).images
    np.testing.assert_allclose(together[0], each[0], atol=1e-5)
    assert np.abs(together[0] - alone).max() > 0.02


def test_without_it_all_is_as_before(ours, folders):
    before = ours(**ONE).images
    ours.load_ip_adapter(folders("one level")[1] / "models" / "plus.safetensors")
    with_it = ours(**ONE, ip_adapter_image=picture(1, 24, 24)).images
    assert np.abs(with_it - before).max() > 0.02
    np.testing.assert_allclose(
        ours(**ONE, ip_adapter_image=picture(1, 24, 24), ip_adapter_scale=0).images, before, atol=1e-5
    )
    assert "ip_adapter: IPAdapter" in repr(ours)
    ours.unload_ip_adapter()
    assert ours.image_encoder is None
    with compilations() as compiled:
        np.testing.assert_array_equal(ours(**ONE).images, before)
    assert compiled == []


def test_kept_features(adapted):
    """DeepCache: an interval of 1 is the whole network."""
    call = ONE | {"ip_adapter_image": picture(1, 24, 24)}
    whole = adapted(**call).images
    np.testing.assert_allclose(adapted(**call, cache_interval=1).images, whole, atol=1e-5)
    assert 0 < np.abs(adapted(**call, cache_interval=3).images - whole).max() < 0.5


def test_pickled_files_are_the_same(adapted, ours, folders, tmp_path):
    """As those that are older on the Hub are."""
    call = ONE | {"ip_adapter_image": picture(1, 24, 24)}
    torch.save(adapter("plain", FAMILIES["one level"], KINDS.index("plain")), tmp_path / "ip-adapter.bin")
    (tmp_path / "image_encoder").symlink_to(folders("one level")[1] / "models" / "image_encoder")
    ours.load_ip_adapter(tmp_path, weight_name="ip-adapter.bin")
    np.testing.assert_array_equal(ours(**call).images, adapted(**call).images)


def test_a_saved_pipeline_is_pytorchs(adapted, folders, tmp_path):
    """With its image encoder; IP-Adapters are loaded again."""
    adapted.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    again = sdjax.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(again.image_encoder, CLIPVisionModelWithProjection)
    for pipe in (theirs, again):
        pipe.load_ip_adapter(str(folders("one level")[1]), "models", "plain.safetensors", image_encoder_folder=None)
    compared(again, theirs, 0.7, BOTH | SIZE | {"ip_adapter_image": picture(1, 24, 24)})


def test_jobs(adapted, ours, folders, tmp_path):
    """A picture's id depends on its prompt's, and on the weights of the adapter."""
    for i in (1, 2):
        picture(i, 24, 24).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in (1, 2)]
    line = {"prompt": "a goose", "width": 16, "height": 16, "num_inference_steps": 2, "scheduler": "ddim"}
    lines = [line | {"ip_adapter_image": paths[0], "ip_adapter_scale": [0.5, 1.0]}]
    lines += [line | {"ip_adapter_image": [[paths]]}]
    batch.run(lines, tmp_path / "out", model=adapted)
    made = sorted((tmp_path / "out").rglob("*.png"))
    assert len(made) == 3
    call = {name: value for name, value in line.items()} | {"ip_adapter_image": [paths], "output_type": "pil"}
    expected = np.asarray(adapted(**call).images[0], np.int16)
    assert min(np.abs(np.asarray(Image.open(path), np.int16) - expected).max() for path in made) <= 1
    ours.load_ip_adapter(folders("one level")[1], "models", "plain.safetensors")
    first = fingerprint(ours)
    assert first == fingerprint(adapted)
    kernel = ours.ip_adapter.image_proj.proj.kernel
    kernel.set_value(kernel.get_value() * 2)
    assert fingerprint(ours) != first
    with pytest.raises(ValueError, match="ip_adapter_image: pictures for 0 IP-Adapters; this pipeline has 1"):
        batch.run([line], tmp_path / "other", model=adapted)


def test_the_command(folders, tmp_path):
    """A picture carries the adapter and its picture, and is made again from them; a job makes the same."""
    model, adapters = folders("one level")
    paths = [str(tmp_path / f"{i}.png") for i in (1, 2)]
    for i, path in enumerate(paths):
        picture(i, 24, 24).save(path)
    loading = ["--model", str(model), "--ip-adapter", str(adapters / "models" / "plain.safetensors")]
    options = ["--sampler", "ddim", "--size", "16x16", "--steps", "2", "--ip-adapter-scale", "0.5"]
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert command("generate", "a goose", *loading, *options, "--ip-adapter-image", paths[0], "--out", str(first)) == 0
    assert command("generate", "--from", str(first), "--out", str(again)) == 0
    np.testing.assert_array_equal(Image.open(again), Image.open(first))
    swept = [part for path in paths for part in ("--ip-adapter-image", path)]
    out = tmp_path / "out"
    assert command("batch", "--prompt", "a goose", *loading, *options, *swept, "--out", str(out), "--quiet") == 0
    made = [np.asarray(Image.open(path), np.int16) for path in sorted(out.rglob("*.png"))]
    assert len(made) == 2
    assert min(np.abs(one - np.asarray(Image.open(first), np.int16)).max() for one in made) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "ip_adapter_image: pictures for 0 IP-Adapters; this pipeline has 1"),
        ({"ip_adapter_image": 3}, "ip_adapter_image: must be a file, a PIL picture or an array"),
        ({"ip_adapter_image": []}, "ip_adapter_image is an empty list"),
        ({"ip_adapter_image": [[]]}, "ip_adapter_image is an empty list"),
        ({"ip_adapter_image": [["a.png", "b.png"]]}, "a.png: there is no such file"),
        ({"ip_adapter_image": [[[np.ones((4, 4))]]]}, "ip_adapter_image: must be a file"),
        ({"ip_adapter_image": np.ones((4, 4)), "ip_adapter_scale": "a"}, "ip_adapter_scale must be"),
        ({"ip_adapter_image": [[np.ones((4, 4))]], "ip_adapter_mask": [[np.ones((4, 4))] * 2]}, "one for each picture"),
        ({"ip_adapter_image": np.ones((4, 4)), "ip_adapter_scale": {}}, "ip_adapter_scale must be numbers"),
        ({"ip_adapter_image": np.ones((4, 4)), "ip_adapter_scale": {"up": "a"}}, "ip_adapter_scale: up must be a fin"),
        ({"ip_adapter_image": np.ones((4, 4)), "ip_adapter_scale": {"up": {"block_7": 1}}}, "up.block_7' has no cross"),
        ({"ip_adapter_image": np.ones((4, 4)), "ip_adapter_scale": [[1.0, 2.0]]}, "ip_adapter_scale: 2 values for 1"),
        ({"ip_adapter_image": [[np.ones((4, 4))], [np.ones((4, 4))] * 2], "seed": [1, 2]}, "of a batch have as many"),
    ],
)
def test_bad_arguments(adapted, arguments, message):
    with compilations() as compiled, pytest.raises(ValueError, match=message):
        adapted(**ONE, **arguments)
    assert compiled == []


def test_a_picture_without_an_adapter(ours):
    with pytest.raises(ValueError, match="this pipeline has no IP-Adapter; load it with load_ip_adapter"):
        ours(**ONE, ip_adapter_image=picture(1, 16, 16))


def test_files_that_do_not_fit(ours, folders, tmp_path):
    """Nothing is changed by them."""
    _, adapters = folders("one level")
    plain = flat(adapter("plain", FAMILIES["one level"], 0))

    def refused(tensors, message, **options):
        save_file(tensors, tmp_path / "file.safetensors")
        options = {"image_encoder_folder": None} | options
        with pytest.raises((sdjax.CheckpointError, ValueError), match=message):
            ours.load_ip_adapter(tmp_path / "file.safetensors", **options)
        assert ours.ip_adapters == ()
        assert ours.image_encoder is None

    refused(flat(adapter("plain", oracle.SDXL, 0)), r"for a model \(text states of width 56\), and this is a model")
    refused({"unet.conv_in.weight": torch.zeros(4)}, "file.safetensors: no IP-Adapter")
    refused(plain | {"ip_adapter.0.to_q_lora.down.weight": torch.zeros(4)}, "the LoRA in it does not fit this UNet")
    refused(
        {name: value for name, value in plain.items() if ".3." not in name}, r"missing: ip_adapter.3.to_k_ip.weight"
    )
    image_encoder(VISION | {"projection_dim": 8}).save_pretrained(tmp_path / "encoder")
    refused(plain, "gives embeddings of width 8, where the adapter takes 20", image_encoder_folder="encoder")
    with pytest.raises(FileNotFoundError, match="has no folder 'image_encoder'"):
        ours.load_ip_adapter(adapters, "", "models/plain.safetensors")
    with pytest.raises(ValueError, match="subfolder: 2 values for 3 IP-Adapters"):
        ours.load_ip_adapter(adapters, ["models", "models"], [f"{kind}.safetensors" for kind in KINDS])
    with pytest.raises(sdjax.CheckpointError, match=r"an IP-Adapter, no model: .* give this file to load_ip_adapter"):
        sdjax.StableDiffusionPipeline.from_pretrained(adapters / "models" / "plain.safetensors")
