"""sdjax.request: what a picture is, checked and written field by field."""

import json

import numpy as np
import pytest

from sdjax.request import FIELDS, Request, for_images, from_settings

SAID = {
    "prompt": "a goose",
    "negative_prompt": "a duck",
    "prompt_2": "in oil",
    "seed": 2**64 - 1,
    "scheduler": "dpmpp_2m_karras",
    "num_inference_steps": 8,
    "guidance_scale": 3,
    "guidance_rescale": 0.5,
    "guidance_interval": "0.3:inf",
    "width": 64,
    "height": 32,
    "clip_skip": 1,
    "noise": "torch",
    "cache_interval": 2,
    "vae_tiling": True,
    "original_size": [1024, 768],
    "negative_aesthetic_score": 2,
}


def test_settings_are_strict_json_that_gives_the_same_request():
    request = from_settings(SAID)
    settings = json.loads(json.dumps(request.settings(), allow_nan=False))
    assert from_settings(settings) == request
    assert request.guidance_interval == (0.3, float("inf")) and request.original_size == (1024, 768)


@pytest.mark.parametrize(
    ("name", "value", "written", "steps"),
    [
        ("timesteps", [999, 499.5, 0], "999,499.5,0", 3),
        ("timesteps", "999, 499", "999,499", 2),
        ("sigmas", np.array([14.6, 0.1, 0]), "14.6,0.1,0", 2),
    ],
)
def test_timesteps_and_sigmas_say_how_many_steps_there_are(name, value, written, steps):
    for request in (
        from_settings({"prompt": "a goose", name: value, "num_inference_steps": 30}),
        for_images({"prompt": "a goose", name: value}, 1, 1)[0],
    ):
        assert request.num_inference_steps == steps and request.settings()[name] == written
        assert from_settings(json.loads(json.dumps(request.settings()))) == request
    assert FIELDS[name].values([value, value]) == (getattr(request, name),) * 2


def test_a_checked_value_is_checked_to_itself(tmp_path):
    (tmp_path / "style.safetensors").touch()
    said = SAID | {"loras": {str(tmp_path / "style.safetensors"): 0.5}}
    for name, value in said.items():
        [checked] = FIELDS[name].values(value)
        assert list(FIELDS[name].values((checked,))) == [checked], name


def test_what_is_off_is_left_out_of_the_settings_and_the_id():
    plain = Request("a goose")
    assert {"cache_interval", "loras", "noise", "original_size"}.isdisjoint(plain.settings())
    assert plain.settings()["num_inference_steps"] == 50
    assert plain.id("m") == from_settings({"prompt": "a goose", "vae_tiling": False}).id("m")
    ids = {from_settings(SAID | {name: FIELDS[name].default}).id("m") for name in SAID if name != "prompt"}
    assert len(ids) == len(SAID) - 1 and from_settings(SAID).id("m") not in ids
    assert plain.id("m") != plain.id("n")


def test_a_config_of_a_sampler_is_a_value():
    config = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    request = from_settings({"prompt": "a goose", "scheduler": config})
    assert from_settings(request.settings()).scheduler.config == request.scheduler.config


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prompt", 5, "prompt must be text"),
        ("prompt", "half \ud83e", "prompt must be text of whole characters: character 5"),
        ("negative_prompt", "byte \udcff", "negative_prompt must be text of whole characters"),
        ("seed", -1, "seed must be a whole number from 0 to 2"),
        ("seed", True, "not True"),
        ("num_inference_steps", 2.5, "num_inference_steps must be a whole number, 1 or more, not 2.5"),
        ("guidance_scale", float("nan"), "guidance_scale must be a finite number"),
        ("guidance_scale", "3", "guidance_scale must be a finite number"),
        ("guidance_scale", 10**400, "guidance_scale must be a finite number"),
        ("guidance_rescale", 2, "from 0 to 1"),
        ("guidance_interval", "5:0.3", "guidance_interval must be two noise levels"),
        ("scheduler", "eulr", "did you mean 'euler'"),
        ("scheduler", 5, "the name of a sampler"),
        ("timesteps", "999,a", "timesteps must be numbers, such as"),
        ("sigmas", [float("inf"), 0], "sigmas must be numbers"),
        ("noise", "cpu", "noise must be one of jax, torch, cuda"),
        ("vae_tiling", 1, "vae_tiling must be true or false"),
        ("target_size", [1024], "target_size must be .height, width."),
        ("loras", ["no-such.safetensors"], "loras must be"),
        ("loras", {"./no-such.safetensors": 1}, "no such file"),
        ("generator", 7, "'generator'; here it is seed"),
        ("guidence_scale", 7, "did you mean guidance_scale"),
    ],
)
def test_what_is_wrong_is_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        from_settings({"prompt": "a goose", name: value})


def test_an_array_without_axes_is_one_value():
    assert FIELDS["guidance_scale"].values(np.array(3.0)) == (3.0,)
    assert FIELDS["controlnet_conditioning_scale"].values(np.array(0.5)) == ((0.5,),)


def test_arguments_for_several_images():
    made = for_images({"prompt": ["a", "b"], "seed": 7, "guidance_scale": np.array([2.0, 3.0])}, 2, 4)
    assert [(r.prompt, r.seed, r.guidance_scale) for r in made] == [("a", 7, 2), ("a", 8, 2), ("b", 9, 3), ("b", 10, 3)]
    made = for_images({"prompt": "a", "seed": range(3), "original_size": (5, 6)}, 1, 3)
    assert [(r.seed, r.original_size) for r in made] == [(0, (5, 6)), (1, (5, 6)), (2, (5, 6))]
    sizes = for_images({"prompt": ["a", "b"], "original_size": [(5, 6), (7, 8)]}, 2, 2)
    assert [r.original_size for r in sizes] == [(5, 6), (7, 8)]
    with pytest.raises(ValueError, match="guidance_scale: 3 values for 4 images; give 1 or 2 or 4"):
        for_images({"prompt": ["a", "b"], "guidance_scale": [1, 2, 3]}, 2, 4)
    with pytest.raises(ValueError, match="seed: 3 seeds for 4 images"):
        for_images({"prompt": "a", "seed": [1, 2, 3]}, 1, 4)
