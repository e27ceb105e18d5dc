"""sdjax.models.safety_checker against PyTorch diffusers, transformers' image processor and Pillow."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion import safety_checker as diffusers_checker
from flax import nnx
from oracle import assert_close, normal, randomised
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil

from sdjax.checkpoints.errors import CheckpointError
from sdjax.models import StableDiffusionSafetyChecker, StableDiffusionSafetyCheckerConfig, safety_checker

SIZE = 24
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": 8,
}
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
SHAPES = {"exact": (24, 24), "larger": (64, 64), "wide": (40, 90), "tall": (50, 31), "smaller": (20, 16)}

embed = nnx.jit(StableDiffusionSafetyChecker.embed)
flag = nnx.jit(StableDiffusionSafetyChecker.flag)
check = nnx.jit(StableDiffusionSafetyChecker.__call__)
pixels = jax.jit(safety_checker.clip_pixels, static_argnums=1)


def reference_checker(act: str = "quick_gelu"):
    vision = VISION | {"hidden_act": act}
    config = CLIPConfig(projection_dim=12, vision_config=vision, text_config=TEXT)
    return randomised(diffusers_checker.StableDiffusionSafetyChecker(config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checker as PyTorch saves it. It flags 15 of the 30 pictures in `SHAPES`, one of them only by special care."""
    folder = tmp_path_factory.mktemp("checker")
    reference = reference_checker()
    reference.special_care_embeds_weights.fill_(0.38)
    reference.concept_embeds_weights.fill_(0.454)
    reference.save_pretrained(folder)
    return folder


def loaded_reference(folder: Path):
    return diffusers_checker.StableDiffusionSafetyChecker.from_pretrained(folder).requires_grad_(False)


def pictures(height: int, width: int, count: int = 6) -> np.ndarray:
    """Waves of all colours and some noise, float32 in 0..1."""
    rng = np.random.default_rng(height * width)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    frequency, phase = rng.uniform(0, 12, (count, 1, 1, 3, 2)), rng.uniform(0, 6, (count, 1, 1, 3))
    waves = np.sin(frequency[..., 0] * y[..., None] + frequency[..., 1] * x[..., None] + phase)
    brightness = rng.uniform(-0.5, 0.5, (count, 1, 1, 3))
    noise = rng.normal(0, 0.05, waves.shape)
    return (0.5 + 0.4 * waves + brightness + noise).clip(0, 1).astype(np.float32)


def processed(images: np.ndarray, size: int) -> np.ndarray:
    """What transformers' processor gives for the pictures that a PyTorch pipeline shows it, NHWC."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    shown = [Image.fromarray((image * 255).round().astype("uint8")) for image in images]
    return np.moveaxis(np.stack(processor(shown).pixel_values), 1, -1)


@pytest.mark.parametrize(("length", "new"), [(24, 24), (90, 54), (512, 224), (7, 24), (31, 100)])
def test_the_weights_of_resizing(length, new):
    """Against Pillow, in float: each row of the identity is a picture."""
    rows = Image.fromarray(np.eye(length, dtype=np.float32)).resize((new, length), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(safety_checker.bicubic_weights(length, new), np.asarray(rows).T, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "size"),
    [*((shape, SIZE) for shape in SHAPES.values()), ((23, 47), 15), ((16, 41), 25), ((512, 640), 224)],
)
def test_pixels_are_those_of_the_image_processor(shape, size):
    images = pictures(*shape, count=2)
    np.testing.assert_allclose(pixels(images, size), processed(images, size), atol=1e-6)  # one level is 0.014


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_embeddings(tmp_path, act):
    reference = reference_checker(act)
    reference.save_pretrained(tmp_path)
    x = normal(3, SIZE, SIZE, 3)
    pooled = reference.vision_model(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).pooler_output
    model = StableDiffusionSafetyChecker.from_pretrained(tmp_path)
    assert_close(embed(model, x), reference.visual_projection(pooled))


def test_flags_of_pictures_of_many_sizes(saved):
    reference, model = loaded_reference(saved), StableDiffusionSafetyChecker.from_pretrained(saved)
    flags, expected = [], []
    for shape in SHAPES.values():
        images = pictures(*shape)
        seen = torch.from_numpy(np.moveaxis(processed(images, SIZE), -1, 1).copy())
        expected += reference(clip_input=seen, images=list(images.copy()))[1]
        flags += check(model, images).tolist()
    assert flags == expected
    assert [0 < sum(flags[i : i + 6]) < 6 for i in range(0, 30, 6)] == [True] * 5
    assert sum(flags) == 15


def expected_flags(reference, embeds: np.ndarray) -> list[bool]:
    """What PyTorch says to image embeddings."""
    model = diffusers_checker.StableDiffusionSafetyChecker
    concepts = {name: value for name, value in reference.named_parameters() if "embeds" in name}
    stand_in = SimpleNamespace(vision_model=lambda x: (None, x), visual_projection=torch.nn.Identity(), **concepts)
    return model.forward(stand_in, torch.from_numpy(embeds), list(np.ones((len(embeds), 1))))[1]


def test_special_care_lowers_the_thresholds(saved):
    """Embeddings around one concept's threshold, near or far from what needs special care."""
    reference = loaded_reference(saved)
    concept, special, rest = np.linalg.qr(normal(12, 3))[0].T
    reference.concept_embeds[:] = -torch.from_numpy(concept)
    reference.concept_embeds[5] = 3 * torch.from_numpy(concept)
    reference.special_care_embeds[:] = torch.from_numpy(-special)
    reference.special_care_embeds[2] = torch.from_numpy(2 * special)
    cosines = [(c, s) for c in (0.44, 0.4444, 0.4446, 0.45, 0.4544, 0.4546, 0.6) for s in (0.3, 0.3804, 0.3806, 0.6)]
    embeds = [c * concept + s * special + (1 - c * c - s * s) ** 0.5 * rest for c, s in cosines]
    embeds = (7 * np.stack(embeds)).astype(np.float32)
    model = StableDiffusionSafetyChecker.from_pretrained(saved)
    for name, value in reference.named_parameters():
        if "embeds" in name:
            getattr(model, name).set_value(jnp.asarray(value.numpy()))
    flags = flag(model, embeds).tolist()
    assert flags == expected_flags(reference, embeds)
    # in 3 decimals 0.0004 too much is none
    assert flags == [c > 0.4545 or (c > 0.4445 and s > 0.3805) for c, s in cosines]


def test_thresholds_stay_float32(saved):
    model = StableDiffusionSafetyChecker.from_pretrained(saved, dtype=jnp.bfloat16)
    tensors = load_file(saved / "model.safetensors")
    for name in ("concept_embeds", "concept_embeds_weights", "special_care_embeds", "special_care_embeds_weights"):
        value = getattr(model, name)[...]
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, tensors[name])
    x = normal(2, SIZE, SIZE, 3)
    assert embed(model, x).dtype == jnp.bfloat16
    assert_close(embed(model, x), embed(StableDiffusionSafetyChecker.from_pretrained(saved), x), 5e-2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_overflows_is_flagged(saved, value):
    model = StableDiffusionSafetyChecker.from_pretrained(saved)
    model.concept_embeds_weights.set_value(jnp.full(17, 2.0))  # never
    embeds = np.ones((2, model.config.projection_dim), np.float16)
    embeds[1, 0] = value
    assert model.flag(jnp.asarray(embeds)).tolist() == [False, True]


def test_what_is_saved_loads_in_diffusers(saved, tmp_path):
    StableDiffusionSafetyChecker.from_pretrained(saved).save_pretrained(tmp_path)
    cls = diffusers_checker.StableDiffusionSafetyChecker
    reference, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    original = loaded_reference(saved).state_dict()
    assert original.keys() == reference.state_dict().keys()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(value, original[name], rtol=0, atol=0)


def test_names_with_and_without_the_inner_prefix_load_alike(saved, tmp_path):
    """transformers 5 saves without it; every published checkpoint has it, and a position_ids buffer."""
    tensors = load_file(saved / "model.safetensors")
    assert not any(name.startswith("vision_model.vision_model.") for name in tensors)
    inner = {name for name in tensors if name.startswith("vision_model.")}
    old = {f"vision_model.{name}" if name in inner else name: tensor for name, tensor in tensors.items()}
    old["vision_model.vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    a, b = (
        nnx.to_pure_dict(nnx.state(StableDiffusionSafetyChecker.from_pretrained(folder)))
        for folder in (saved, tmp_path)
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)


PUBLISHED = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}


@pytest.mark.parametrize(
    "config",
    [
        {"projection_dim": 768, "text_config": {"hidden_size": 768}, "vision_config": {"dropout": 0.0, **PUBLISHED}},
        {"projection_dim": 768, "vision_config_dict": PUBLISHED, "vision_config": {"hidden_size": 512}},
        {},
    ],
    ids=["SD 1.5", "SD 1.4", "empty"],
)
def test_configs_are_read_as_transformers_reads_them(config):
    expected = CLIPConfig(**config)
    actual = StableDiffusionSafetyCheckerConfig.from_dict(config)
    assert actual.projection_dim == expected.projection_dim
    for name, value in actual.to_dict()["vision_config"].items():
        assert getattr(expected.vision_config, name) == value, name


def test_what_is_not_implemented_is_named():
    with pytest.raises(CheckpointError, match="hidden_act='gelu_new'"):
        StableDiffusionSafetyCheckerConfig.from_dict({"vision_config": {"hidden_act": "gelu_new"}})
    with pytest.raises(CheckpointError, match="num_channels=1"):
        StableDiffusionSafetyCheckerConfig.from_dict({"vision_config": {"num_channels": 1}})
