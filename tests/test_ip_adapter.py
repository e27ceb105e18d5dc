"""IP-Adapters against PyTorch diffusers: pictures as prompts, of several kinds, several at once."""

import diffusers
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations
from safetensors.torch import save_file
from test_image_to_image import CALL, SEEDS, generators, picture
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import sdjax
from sdjax import batch, sampling
from sdjax.models.ip_adapter import HEAD

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # of diffusers' schedulers
    pytest.mark.filterwarnings("ignore:.*requires torchvision"),
]
FAMILIES = {"sd1": oracle.SD1, "sdxl": oracle.SDXL}
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


def flat(halves: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{half}.{name}": value for half, own in halves.items() for name, value in own.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a pipeline and that of its IP-Adapters, which is like those on the Hub."""
    made = {}

    def folders(name):
        if name not in made:
            family, folder = FAMILIES[name], tmp_path_factory.mktemp(name)
            encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION))
            oracle.randomised(encoder, 9).save_pretrained(folder / "adapters" / "models" / "image_encoder")
            for seed, kind in enumerate(KINDS):
                save_file(flat(adapter(kind, family, seed)), folder / "adapters" / "models" / f"{kind}.safetensors")
            made[name] = oracle.save_pipeline(folder, family), folder / "adapters"
        return made[name]

    return folders


@pytest.fixture(scope="module")
def pair(folders):
    """Our pipeline and PyTorch's, of a class, with IP-Adapters of these kinds."""
    ours = {}

    def pair(name, kinds, cls=diffusers.StableDiffusionPipeline, **components):
        model, adapters = folders(name)
        files = [f"{kind}.safetensors" for kind in kinds]
        if name not in ours:
            ours[name] = sdjax.StableDiffusionPipeline.from_pretrained(model)
        checked = {} if name == "sdxl" else {"safety_checker": None}
        theirs = cls.from_pretrained(model, **checked, **components)
        theirs.set_progress_bar_config(disable=True)
        for pipe in (ours[name], theirs):
            pipe.load_ip_adapter(str(adapters), subfolder="models", weight_name=files)
        return ours[name], theirs

    return pair


CLASSES = {"sd1": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}


def compared(ours, theirs, name, scales, given, both):
    """given: by PyTorch's names."""
    scheduler = sampling.from_config(ours.scheduler.config, sampler=name)
    theirs.scheduler = getattr(diffusers, scheduler.config["_class_name"]).from_config(dict(scheduler.config))
    theirs.set_ip_adapter_scale(scales)
    expected = theirs(generator=generators(), **given, **both).images
    return scheduler, expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_pytorch(pair, family, kind):
    ours, theirs = pair(family, [kind], CLASSES[family])
    shown = picture(1, 50, 35)
    both = CALL | {"prompt": ["a goose", "blue"], "ip_adapter_image": shown, "height": 32, "width": 40}
    scheduler, expected = compared(ours, theirs, "ddim", 0.7, {}, both)
    made = ours(seed=SEEDS, noise="torch", scheduler=scheduler, ip_adapter_scale=0.7, **both).images
    np.testing.assert_allclose(made, expected, atol=1e-4)
    other = ours(seed=SEEDS, noise="torch", scheduler=scheduler, ip_adapter_scale=0.0, **both).images
    assert np.abs(other - made).max() > 0.02
