"""Dynamic thresholding (arXiv:2205.11487, section 2.3) against PyTorch diffusers' schedulers and pipeline."""

import diffusers
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compilations import compilations
from trajectories import Oracle, compare, difference, draws, run, scheduler

import sdjax
from sdjax.sampling import Table, from_config
from sdjax.sampling.loop import denoise

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers under NumPy 2
    pytest.mark.filterwarnings("ignore::RuntimeWarning:diffusers"),  # its logarithms of level 0
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ON = {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 1.6}
EPSILON = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
CASES = [  # not the single-step solver on epsilon, with which diffusers raises
    ("DDPMScheduler", {}),
    ("DDIMScheduler", {"eta": 0.5}),
    ("DDIMScheduler", {"clip_sample": True}),
    ("LCMScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    ("DPMSolverMultistepScheduler", EPSILON),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    ("DEISMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
]


@pytest.mark.parametrize("most", [1.0, 1.6, 0.5])
@pytest.mark.parametrize(("class_name", "config"), CASES)
def test_trajectory(monkeypatch, class_name, config, most):
    config = config | ON | {"sample_max_value": most}
    theirs = Oracle(monkeypatch, class_name, config)
    for prediction in ("epsilon", "v_prediction"):
        theirs.configure(prediction_type=prediction)
        assert compare(scheduler(class_name, config | {"prediction_type": prediction}), theirs, 10) < 1e-4


def test_denoise_thresholds_each_image_as_its_table_says():
    tables = [from_config("dpmpp_2m", **ON).table(9), from_config("heun").table(5)]
    assert Table.stack(tables[1:]).threshold is None
    noise, x = draws(9, seed=2), draws(1)[0]

    def model(x, t):
        t = t.reshape(-1, 1, 1, 1)
        return 0.7 * jnp.sin(x + t / 300) + 0.3 * jnp.sin(3 * x)

    for stack in (tables, [tables[1], from_config("ddim", **ON).table(7)]):
        start = x * Table.stack(stack).init_noise_sigma.reshape(-1, 1, 1, 1)
        made = denoise(model, Table.stack(stack), jnp.asarray(start, jnp.float32), lambda _: jnp.zeros(x.shape))
        for image, table in enumerate(stack):
            expected = run(table, start, 0 * noise)[-1][image]
            assert difference(np.asarray(made)[None, image], expected[None]) < 1e-4


@pytest.mark.parametrize("name", ["ddim", "unipc"])
def test_pictures_are_those_of_pytorch(one_level_folder, name):
    ours = sdjax.StableDiffusionPipeline.from_pretrained(one_level_folder)
    ours.scheduler = from_config(ours.scheduler.config, name, **ON)
    config = dict(ours.scheduler.config)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(one_level_folder, safety_checker=None)
    theirs.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    theirs.set_progress_bar_config(disable=True)
    noise, call = oracle.normal(2, 8, 8, 4), {"num_inference_steps": 6, "output_type": "np"}
    prompts = ["a goose", "blue"]
    made = ours(prompts, latents=noise, **call).images
    np.testing.assert_allclose(made, theirs(prompts, latents=oracle.nchw(noise), **call).images, atol=1e-4)
    with compilations() as compiled:
        other = from_config(config, dynamic_thresholding_ratio=0.9, sample_max_value=3.0)
        ours(prompts, latents=noise, scheduler=[other, "euler"], **call)
    assert compiled == []
