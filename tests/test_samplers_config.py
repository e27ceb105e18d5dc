"""Configurations, names and errors; tables side by side; the scan that runs them."""

import ast
import dataclasses
import json
from pathlib import Path

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
from trajectories import SHAPE, difference, draws, run

import sdjax.sampling
from sdjax.sampling import NAMES, Table, from_config
from sdjax.sampling.classes import CLASSES, INFINITE
from sdjax.sampling.loop import denoise

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers under NumPy 2

CONTINUOUS = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
SD1 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


STATED = {k: v for k, v in SD1.items() if k not in ("_class_name", "_diffusers_version", "clip_sample")}
XL = {"interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0, "use_karras_sigmas": False}
PUBLISHED = {
    "sd 1, first": {"_class_name": "PNDMScheduler", "_diffusers_version": "0.2.2", "timestep_values": None}
    | {k: SD1[k] for k in ("beta_end", "beta_schedule", "beta_start", "num_train_timesteps", "skip_prk_steps")},
    "sd 1, of diffusers 0.2": STATED
    | {"_class_name": "LMSDiscreteScheduler", "tensor_format": "pt", "timestep_values": None, "predict_epsilon": True},
    "sd 1.5": SD1,
    "sd 2.1": SD1 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "sdxl": SD1 | XL | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    "sd turbo": SD1
    | XL
    | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "timestep_type": "discrete"}
    | {"rescale_betas_zero_snr": False, "sigma_max": None, "sigma_min": None},
    "sdxl turbo": SD1
    | XL
    | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing", "timestep_type": "discrete"}
    | {"sigma_max": None, "sigma_min": None},
    "lcm": STATED
    | {"_class_name": "LCMScheduler", "clip_sample": False, "clip_sample_range": 1.0, "original_inference_steps": 50}
    | {"dynamic_thresholding_ratio": 0.995, "set_alpha_to_one": True, "steps_offset": 0, "thresholding": False},
}
"""What scheduler_config.json says in repositories of the Hub."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_diffusers_timesteps_and_levels(name):
    config = PUBLISHED[name]
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    theirs.set_timesteps(4)
    ours = from_config(config)
    np.testing.assert_allclose(ours.timesteps(4), theirs.timesteps, rtol=1e-6)
    np.testing.assert_allclose(ours.schedule.alpha_bar, theirs.alphas_cumprod, rtol=1e-4)


def assert_equal_tables(a, b):
    for name in (field.name for field in dataclasses.fields(a)):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("name", NAMES)
def test_names_are_stable_diffusions_schedule(name):
    ours = from_config(name)
    assert_equal_tables(ours.table(7), from_config(SD1, name).table(7))
    np.testing.assert_allclose(ours.schedule.levels[-1], 14.6146, rtol=1e-5)
    assert len(ours.timesteps(7)) == len(ours.table(7))


@pytest.mark.parametrize("name", NAMES)
def test_rows_keep_their_draws_when_a_run_is_cut(name):
    """A draw names the row of the whole run at the same timestep."""
    ours = from_config(name)
    whole = ours.table(10)
    assert whole.draw.dtype == np.int64 and whole.draw.tolist() == list(range(len(whole)))
    for part in ({"strength": 0.55}, {"denoising_start": 0.62}, {"denoising_start": 0.3, "denoising_end": 0.8}):
        cut = ours.table(10, **part)
        assert 1 < len(cut) < len(whole) and (np.diff(cut.draw) == 1).all() and cut.draw[0] > 0
        if name != "pndm":  # which repeats its second row in every run, and has no noise
            np.testing.assert_array_equal(whole.t[cut.draw], cut.t)
    base, refiner = ours.table(10, denoising_end=0.6), ours.table(10, denoising_start=0.6)
    assert base.draw.tolist() == list(range(len(base)))
    assert len(whole) - len(refiner) == refiner.draw[0] and refiner.draw[-1] == len(whole) - 1
    stack = Table.stack([whole, refiner])
    np.testing.assert_array_equal(stack.draw[: len(refiner), 1], refiner.draw)


def test_a_name_takes_overrides():
    ours = from_config("lms", beta_start=0.001, beta_end=0.02, beta_schedule="linear")
    assert (ours.config["beta_start"], ours.config["beta_schedule"]) == (0.001, "linear")
    assert ours.schedule.alpha_bar[0] == pytest.approx(0.999)


@pytest.mark.parametrize("class_name", CLASSES)
def test_absent_options_are_diffusers_defaults(class_name):
    theirs = dict(getattr(diffusers, class_name)().config)
    options = dict(CLASSES[class_name].options)
    for ours_alone in ("eta", "clip_sample"):
        options.pop(ours_alone, None)
    for option, value in options.items():
        assert np.all(theirs[option] == (list(value) if isinstance(value, tuple) else value)), option


@pytest.mark.parametrize("class_name", CLASSES)
def test_swapping_carries_over_what_diffusers_does(class_name):
    """SD 1's configuration says nothing of the spacing: it becomes the new class's."""
    theirs = getattr(diffusers, class_name).from_config(diffusers.PNDMScheduler.from_config(SD1).config)
    source = from_config(SD1).config
    ours = from_config(source, class_name) if class_name != "PNDMScheduler" else from_config(source)
    for option in set(CLASSES[class_name].options) - {"eta", "disable_corrector"}:
        assert ours.config.get(option, INFINITE.get(option)) == theirs.config[option], option


@pytest.mark.parametrize("name", ["ddim", "euler", "unipc", "dpmpp_2m_sde_karras"])
def test_config_is_read_back_by_us_and_by_diffusers(name):
    ours = from_config(name)
    saved = json.loads(json.dumps(dict(ours.config)))
    assert_equal_tables(from_config(saved).table(5), ours.table(5))
    theirs = getattr(diffusers, saved["_class_name"]).from_config(saved)
    assert not theirs.config.get("clip_sample", False)
    for option in set(CLASSES[saved["_class_name"]].options) - {"eta", "disable_corrector"}:
        assert theirs.config[option] == ours.config.get(option, INFINITE.get(option)), option


def test_a_plain_name_switches_respacing_off():
    karras = from_config("dpmpp_2m_karras").config
    assert karras["use_karras_sigmas"]
    assert not from_config(karras, "euler").config["use_karras_sigmas"]
    assert from_config(karras, "EulerDiscreteScheduler").config["use_karras_sigmas"]
    assert from_config(karras, "unipc").config["solver_type"] == "bh2"


def test_options_without_effect_pass():
    neutral = {
        "thresholding": True,  # in diffusers PNDM has no such option
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 2.0,
        "use_flow_sigmas": False,
        "flow_shift": 3.0,
        "solver_p": None,
        "tensor_format": "pt",
        "timestep_values": None,
        "predict_epsilon": True,
        "rescale_betas_zero_snr": None,
        "new_option": False,
        "another": None,
    }
    assert_equal_tables(from_config(SD1 | neutral).table(4), from_config(SD1).table(4))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("dpmp_2m", {}, "unknown sampler 'dpmp_2m'; did you mean 'dpmpp_2m'"),
        ("DDIMSchedule", {}, "did you mean .*DDIMScheduler"),
        ("zzz", {}, "known are ddpm, ddim"),
        ("euler_cfg_pp", {}, "CFG\\+\\+ is cfg_plus_plus, with the sampler 'euler'"),
        ({"beta_start": 0.1}, {}, "no '_class_name'"),
        ("pndm", {"thresholding": True}, "PNDMScheduler has no option 'thresholding'"),
        ("ddim", {"thresholding": True, "sample_max_value": 0.0}, "sample_max_value=0.0 must be more than 0"),
        ("ddim", {"dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio=1.5: must be"),
        ("ddim", {"clip_sample_range": 0.0}, "clip_sample_range=0.0 must be more than 0"),
        ("dpmpp_2m", {"clip_sample": True}, "DPMSolverMultistepScheduler has no option 'clip_sample'"),
        (SD1 | {"use_flow_sigmas": True}, {}, "use_flow_sigmas=True"),
        (SD1 | {"predict_epsilon": False}, {}, "does not support predict_epsilon=False"),
        (SD1, {"new_option": None}, "PNDMScheduler has no option 'new_option'"),
        (SD1 | {"new_option": 1}, {}, "PNDMScheduler has no option 'new_option'; it has beta_end, "),
        (SD1 | {"rescale_betas_zero_snr": True}, {}, "does not support rescale_betas_zero_snr=True"),
        ("euler", {"solver_order": 3}, "EulerDiscreteScheduler has no option 'solver_order'"),
        ("euler", {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction' is not supported, only"),
        ("euler_karras", {"use_beta_sigmas": True}, "only one of use_karras_sigmas, use_beta_sigmas"),
        ("unipc", {"solver_order": 4}, "solver_order=4 is not supported, only 1, 2, 3"),
        ("dpmpp_2m", {"algorithm_type": "dpmsolver"}, "needs final_sigmas_type='sigma_min'"),
        ("dpmpp_2m", {"beta_schedule": "cubic"}, "beta_schedule='cubic'"),
        ("dpmpp_2s", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun"}, "diverges"),
        ("ddpm", {"variance_type": "learned_range"}, "variance_type='learned_range'"),
        ("ddim", {"eta": 1.5}, "eta=1.5 must be in 0 .. 1"),
    ],
)
def test_bad_configurations(config, options, message):
    with pytest.raises(ValueError, match=message):
        from_config(config, **options)


@pytest.mark.parametrize(
    ("name", "options", "call", "message"),
    [
        ("ddim", {}, (0,), r"num_inference_steps=0 must be in 1 \.\. num_train_timesteps=1000"),
        ("ddim", {}, (1001,), "num_inference_steps=1001"),
        ("ddim", {}, (1000,), "steps_offset=1"),
        ("ddim", {}, (10, 0.0), r"strength=0.0 must be in \(0, 1\]"),
        ("ddim", {}, (10, 1.1), "strength=1.1"),
        ("ddim", {}, (10, float("nan")), "strength=nan"),
        ("ddim", {}, (10, 0.05), "leaves none of 10 steps"),
        ("lcm", {}, (51,), "original_inference_steps=50"),
        ("dpmpp_2m", {}, (1000,), "the steps are so many"),
        ("pndm", {"skip_prk_steps": False}, (3,), "skip_prk_steps=False needs 4 steps or more, not 3"),
        ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, (5,), "zero terminal SNR"),
    ],
)
def test_bad_calls(name, options, call, message):
    with pytest.raises(ValueError, match=message):
        from_config(name, **options).table(*call)


@pytest.mark.parametrize(
    ("name", "options", "given", "message"),
    [
        ("euler", {}, {"timesteps": [9, 5], "sigmas": [5, 0]}, "timesteps and sigmas: give one"),
        ("euler", {}, {"timesteps": [5, 9]}, "timesteps must be descending numbers"),
        ("euler", {}, {"timesteps": [9, 9]}, "timesteps must be descending numbers"),
        ("euler", {}, {"timesteps": []}, "timesteps must be descending numbers"),
        ("euler", {}, {"timesteps": [1000, 9]}, "timesteps must be from 0 to 999, not 1000 to 9"),
        ("euler", {}, {"timesteps": [9, -1]}, "timesteps must be from 0 to 999, not 9 to -1"),
        ("euler", {}, {"sigmas": [9, -1]}, "sigmas must be from 0 to 1e"),
        ("euler", {}, {"sigmas": [9]}, "sigmas needs two or more"),
        ("euler_karras", {}, {"timesteps": [9, 5]}, "timesteps: not with use_karras_sigmas=True"),
        ("euler", CONTINUOUS, {"timesteps": [9, 5]}, "timesteps: not with timestep_type='continuous'"),
        ("ddpm", {}, {"timesteps": [9.5, 5]}, "timesteps of DDPMScheduler must be whole numbers"),
        ("ddim", {}, {"timesteps": [9, 5]}, "timesteps: DDIMScheduler does not take them; these do: DDPMScheduler, "),
        ("dpmpp_2m", {}, {"sigmas": [9, 5]}, "sigmas: DPM.* does not take them; these do: EulerDiscreteScheduler"),
    ],
)
def test_bad_timesteps_and_sigmas(name, options, given, message):
    with pytest.raises(ValueError, match=message):
        from_config(name, **options).table(**given)


def test_what_a_config_says_of_clipping_is_meant():
    said = {"_class_name": "DDIMScheduler", "clip_sample": True, "clip_sample_range": 2.0}
    clipping = from_config(said)
    assert clipping.config["clip_sample"] and (clipping.table(3).clip == 2).all()
    assert diffusers.DDPMScheduler.from_config(dict(clipping.config)).config.clip_sample
    assert (from_config(clipping.config, "ddpm").table(3).clip == 2).all()
    for other in ("pndm", "dpmpp_2m", "tcd"):  # whose classes do not clip in diffusers
        assert np.isinf(from_config(clipping.config, other).table(3).clip).all()
    absent = from_config({"_class_name": "DDIMScheduler"})
    assert np.isinf(absent.table(3).clip).all()
    assert not diffusers.DDPMScheduler.from_config(dict(absent.config)).config.clip_sample


def test_denoise_clips_and_forgets_as_the_table_says():
    tables = [
        from_config("ddim", clip_sample=True, clip_sample_range=0.5).table(15),
        from_config("PNDMScheduler", skip_prk_steps=False).table(6),
    ]
    noise, start = draws(15, seed=2), draws(1)[0]
    x = denoise(stacked_model, Table.stack(tables), jnp.asarray(start, jnp.float32), drawn(noise))
    for image, table in enumerate(tables):
        expected = run(table, start, noise)[-1][image]
        assert difference(np.asarray(x)[None, image], expected[None]) < 1e-4


def test_table_of_one_row_a_model_evaluation():
    rows = {"ddim": 10, "pndm": 11, "heun": 19, "dpm2": 19, "dpmpp_2s": 10, "unipc": 10}
    assert {name: len(from_config(name).table(10)) for name in rows} == rows


def test_denoised_estimates_a_known_image():
    """A model that knows x0 and the noise: every row's estimate is x0, and so is the sample."""
    x0, noise = draws(2)
    for name in ("ddim", "pndm", "euler", "heun", "lms_karras", "dpmpp_2m", "deis", "unipc", "lcm"):
        ours = from_config(name, prediction_type="epsilon")
        table = ours.table(8)
        alpha = np.sqrt(ours.schedule.alpha_bar[round(table.t[0])])
        x = (alpha * x0 + np.sqrt(1 - alpha**2) * noise) / table.cin[0]
        if name != "lcm":
            x0_estimate = table.denoised[0, 0] * x + table.denoised[0, 1] * (table.skip[0] * x + table.out[0] * noise)
            np.testing.assert_allclose(x0_estimate, x0, atol=2e-2 if name == "lms_karras" else 1e-9)


def stacked_model(x, t):
    t = t.reshape(-1, *(1,) * (x.ndim - 1))
    return 0.7 * jnp.sin(x + t / 300) + 0.3 * jnp.sin(3 * x)


def drawn(noise):
    """The noise [draws B ...] of the numbers that each image asks for."""
    return lambda numbers: jnp.asarray(noise, jnp.float32)[numbers, jnp.arange(len(numbers))]


@pytest.mark.parametrize("name", ["ddim", "pndm", "heun", "euler_ancestral", "dpmpp_2m_sde", "unipc", "lcm"])
def test_denoise_runs_the_table(name):
    table = from_config(name, prediction_type="v_prediction").table(6)
    start, noise = draws(1)[0] * table.init_noise_sigma, draws(len(table), seed=2)
    x = denoise(stacked_model, table, jnp.asarray(start, jnp.float32), drawn(noise))
    assert difference(np.asarray(x)[None], run(table, start, noise)[-1:]) < 1e-4


def test_stack_runs_each_image_by_its_own_table():
    tables = [from_config("pndm").table(5), from_config("euler_ancestral").table(3)]
    stack = Table.stack(tables)
    assert (len(stack), stack.mix.shape, stack.init_noise_sigma.shape) == (6, (6, 2, 2, 8), (2,))
    noise = draws(6, seed=3)
    start = draws(1)[0] * stack.init_noise_sigma.reshape(-1, 1, 1, 1)
    x = denoise(stacked_model, stack, jnp.asarray(start, jnp.float32), drawn(noise))
    for image, table in enumerate(tables):
        expected = run(table, start, noise)[-1][image]
        assert difference(np.asarray(x)[None, image], expected[None]) < 1e-4
    assert SHAPE[0] == len(tables)


def test_stack_of_nothing():
    with pytest.raises(ValueError, match="at least one table"):
        Table.stack([])


def test_imports_neither_jax_nor_torch():
    package = Path(sdjax.sampling.__file__).parent
    for source in (path for path in package.glob("*.py") if path.stem not in ("loop", "guidance", "noise")):
        for node in ast.walk(ast.parse(source.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in ("jax", "flax", "torch", "diffusers"), source
                assert not name.startswith("sdjax") or name.startswith(("sdjax.sampling", "sdjax.fields")), source
