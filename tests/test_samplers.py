"""Every sampler's whole trajectory, step by step, against PyTorch diffusers."""

import inspect
import re

import diffusers
import numpy as np
import pytest
import torch
from trajectories import Oracle, compare, compare_tables, difference, draws, run, scheduler

from sdjax.sampling import NAMES, from_config
from sdjax.sampling.classes import CLASSES
from sdjax.sampling.schedule import NoiseSchedule, scaled_linear

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers under NumPy 2
    pytest.mark.filterwarnings("ignore::RuntimeWarning:diffusers"),  # its logarithms of level 0
]

TOLERANCE = 1e-4
STEPS = (1, 2, 3, 10, 20, 50)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")

MULTISTEP = "DPMSolverMultistepScheduler"
SINGLESTEP = "DPMSolverSinglestepScheduler"
DEIS = "DEISMultistepScheduler"
UNIPC = "UniPCMultistepScheduler"
EULER = "EulerDiscreteScheduler"
INVERSE = "DDIMInverseScheduler"

CONTINUOUS = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
PRK = {"skip_prk_steps": False}

WITHOUT_SAMPLE = {
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    INVERSE,
}
"""For prediction_type="sample" diffusers raises, or divides by the noise of a clean image, which is 0."""


def spacings(class_name):
    return CLASSES[class_name].choices.get("timestep_spacing", SPACINGS)


@pytest.fixture(autouse=True)
def one_quiet_thread():
    torch.set_num_threads(1)
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(verbosity)


def assert_same(monkeypatch, class_name, config, predictions=PREDICTIONS, steps=STEPS):
    oracle = Oracle(monkeypatch, class_name, config)
    wrong = {}
    for prediction in predictions:
        if prediction == "sample" and class_name in WITHOUT_SAMPLE:
            continue
        ours = scheduler(class_name, config | {"prediction_type": prediction})
        oracle.configure(prediction_type=prediction)
        for n in steps:
            if class_name == SINGLESTEP:  # which diffusers' set_timesteps turns on for good
                oracle.configure(lower_order_final=config.get("lower_order_final", False))
            error = compare(ours, oracle, n)
            if not error < TOLERANCE:
                wrong[prediction, n] = error
    assert not wrong, config


@pytest.mark.parametrize("class_name", CLASSES)
def test_trajectory(monkeypatch, class_name):
    spaced = "timestep_spacing" in CLASSES[class_name].options
    for spacing in spacings(class_name) if spaced else ("linspace",):
        assert_same(monkeypatch, class_name, {"timestep_spacing": spacing} if spaced else {"steps_offset": 0})


RESPACED = [(c, {option: True}) for c, s in CLASSES.items() for option in s.options if option.startswith("use_")]

DPM_SOLVER = [
    (class_name, {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind, "final_sigmas_type": end})
    for class_name in (MULTISTEP, SINGLESTEP)
    for algorithm in CLASSES[class_name].choices["algorithm_type"]
    for order in (1, 2, 3)
    for kind in ("midpoint", "heun")
    for end in ("zero", "sigma_min")
    if algorithm.endswith("++") or end == "sigma_min"  # else diffusers raises, and so do we
    if (algorithm, order) != ("sde-dpmsolver", 3)  # diffusers has no such update
    if (class_name, algorithm, order, kind) != (SINGLESTEP, "sde-dpmsolver++", 3, "heun")  # diffusers' diverges
]

MULTISTEP_OPTIONS = [
    (MULTISTEP, {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    (MULTISTEP, {"lower_order_final": False}),
    (MULTISTEP, {"lower_order_final": False, "solver_order": 3, "final_sigmas_type": "sigma_min"}),
    (MULTISTEP, {"lambda_min_clipped": -2.0}),
    (MULTISTEP, {"lambda_min_clipped": -2.0, "timestep_spacing": "trailing"}),
    (MULTISTEP, {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    (SINGLESTEP, {"lambda_min_clipped": -2.0}),
    (SINGLESTEP, {"lower_order_final": True, "solver_order": 3, "final_sigmas_type": "sigma_min"}),
    *((DEIS, {"solver_order": order, "lower_order_final": lower}) for order in (1, 2, 3) for lower in (True, False)),
]

UNIPC_OPTIONS = [
    *(
        (UNIPC, {"solver_order": order, "solver_type": kind, "predict_x0": x0, "final_sigmas_type": "sigma_min"})
        for order in (1, 2, 3)
        for kind in ("bh1", "bh2")
        for x0 in (True, False)
    ),
    (UNIPC, {"solver_order": 1}),
    (UNIPC, {"solver_order": 3}),
    (UNIPC, {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    (UNIPC, {"solver_order": 3, "disable_corrector": [0, 2]}),
    (UNIPC, {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0}),
    (UNIPC, {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
]

OPTIONS = [
    (EULER, {"final_sigmas_type": "sigma_min"}),
    (EULER, {"interpolation_type": "log_linear"}),
    (EULER, {"timestep_type": "continuous"}),
    (EULER, {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0}),
    ("DDPMScheduler", {"variance_type": "fixed_large"}),
    ("DDPMScheduler", {"variance_type": "fixed_small_log"}),
    ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
    ("DDIMScheduler", {"eta": 0.5}),
    ("DDIMScheduler", {"eta": 1.0, "set_alpha_to_one": False}),
    ("PNDMScheduler", {"set_alpha_to_one": True}),
    ("LCMScheduler", {"original_inference_steps": 100, "timestep_scaling": 1.0}),
    *(("TCDScheduler", {"eta": eta, "original_inference_steps": 100}) for eta in (0.0, 0.7, 1.0)),
]


@pytest.mark.parametrize("cases", [RESPACED, DPM_SOLVER, MULTISTEP_OPTIONS, UNIPC_OPTIONS, OPTIONS])
def test_options(monkeypatch, cases):
    for class_name, config in cases:
        assert_same(monkeypatch, class_name, config, steps=(1, 3, 16))


@pytest.mark.parametrize(
    "betas",
    [
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"trained_betas": np.linspace(1e-3, 1e-2, 500).tolist(), "num_train_timesteps": 500},
    ],
)
def test_beta_schedules(monkeypatch, betas):
    """From 10 steps on: with 2, KDPM2Ancestral's lower level is the root of a negative number in diffusers' float32."""
    for class_name in CLASSES:
        assert_same(monkeypatch, class_name, betas, steps=(10, 16))


def test_squared_cosine_betas(monkeypatch):
    """Levels go up to 20000. diffusers, in float32, loses the image in x of that size, and x0 in x - sigma epsilon."""
    predictions = ("v_prediction", "sample")
    for class_name, sampler in CLASSES.items():
        if not sampler.variance_exploding:
            assert_same(monkeypatch, class_name, {"beta_schedule": "squaredcos_cap_v2"}, predictions, (1, 10, 16))


def test_karras_timesteps_of_squared_cosine_betas(monkeypatch):
    """The one beta schedule for which diffusers' multistep solver does not round them."""
    config = {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"}
    for class_name in (MULTISTEP, SINGLESTEP):
        expected = Oracle(monkeypatch, class_name, config).set_timesteps(20)
        np.testing.assert_array_equal(scheduler(class_name, config).timesteps(20), expected)


def test_zero_terminal_snr(monkeypatch):
    for class_name, sampler in CLASSES.items():
        if "rescale_betas_zero_snr" in sampler.options:
            for spacing in spacings(class_name):
                config = {"rescale_betas_zero_snr": True, "timestep_spacing": spacing}
                # at level 4096, as at 20000 above, only a prediction of the image survives float32 in a VE sampler
                predictions = ("v_prediction",) if sampler.variance_exploding else ("v_prediction", "sample")
                steps = (10, 16) if sampler.variance_exploding else (1, 10, 16)
                assert_same(monkeypatch, class_name, config, predictions, steps)


def test_sample_prediction_agrees_with_epsilon():
    """Both tables update alike; what "sample" remembers is the epsilon with x = alpha x0 + sigma epsilon."""
    alpha_bar = NoiseSchedule.from_betas(scaled_linear(0.00085, 0.012, 1000)).alpha_bar
    x, x0 = draws(2)
    for class_name in WITHOUT_SAMPLE - {INVERSE}:
        epsilon, sample = (scheduler(class_name, {"prediction_type": p}).table(7) for p in ("epsilon", "sample"))
        for name in ("t", "cin", "mix", "denoised"):
            np.testing.assert_array_equal(getattr(epsilon, name), getattr(sample, name))
        assert (epsilon.skip == 0).all() and (epsilon.out == 1).all()
        for i in range(len(sample)):
            alpha = sample.cin[i] if CLASSES[class_name].variance_exploding else alpha_bar[int(sample.t[i])] ** 0.5
            remembered = sample.skip[i] * x + sample.out[i] * x0
            np.testing.assert_allclose(
                alpha * x0 + (1 - alpha**2) ** 0.5 * remembered, sample.cin[i] * x, rtol=0, atol=1e-9
            )
            np.testing.assert_allclose(sample.denoised[i] @ [x.ravel(), remembered.ravel()], x0.ravel(), atol=1e-9)


@pytest.mark.parametrize("config", [{"solver_type": "bh1"}, {"predict_x0": False}, {"lower_order_final": False}])
def test_unipc_is_finite_where_diffusers_is_not(monkeypatch, config):
    """A step to level 0 has h = infinity: diffusers' last x is NaN; ours is the last x0."""
    oracle, ours = Oracle(monkeypatch, UNIPC, config), scheduler(UNIPC, config)
    oracle.set_timesteps(5)
    start, noise, table = draws(1, seed=1)[0], draws(5), ours.table(5)
    expected, states = oracle.run(start, noise), run(table, start, noise)
    assert not np.isfinite(expected[-1]).all()
    assert np.isfinite(states).all()
    assert difference(states[:-1], expected[:-1]) < TOLERANCE


@pytest.mark.parametrize("class_name", sorted(set(CLASSES) - {"LMSDiscreteScheduler", "PNDMScheduler", INVERSE}))
def test_strength(monkeypatch, class_name):
    oracle, ours = Oracle(monkeypatch, class_name, {}), scheduler(class_name, {})
    for n, strength in ((10, 0.3), (10, 0.75), (20, 0.8), (3, 0.4)):
        assert compare(ours, oracle, n, strength) < TOLERANCE


def test_strength_of_lms(monkeypatch):
    """diffusers, starting in the middle, weighs the one slope it has as the first of four; we start at order one."""
    oracle, ours = Oracle(monkeypatch, "LMSDiscreteScheduler", {}), scheduler("LMSDiscreteScheduler", {})
    oracle.set_timesteps(10)
    oracle.scheduler.sigmas, oracle.scheduler._begin_index = oracle.scheduler.sigmas[4:], None
    oracle.timesteps = oracle.scheduler.timesteps = oracle.scheduler.timesteps[4:]
    start, noise = 5 * draws(1)[0], draws(6)
    assert difference(run(ours.table(10, 0.6), start, noise), oracle.run(start, noise)) < TOLERANCE


def test_strength_of_pndm(monkeypatch):
    """diffusers cuts the repeated second timestep off and takes the third for it; we repeat the second that is left."""
    oracle, ours = Oracle(monkeypatch, "PNDMScheduler", {}), scheduler("PNDMScheduler", {})
    t = torch.tensor(oracle.set_timesteps(10)[5:])
    oracle.timesteps = torch.cat([t[:1], t[1:2], t[1:]])
    start, noise = draws(1)[0], draws(7)
    assert difference(run(ours.table(10, 0.6), start, noise), oracle.run(start, noise)) < TOLERANCE


def exact_flow(x, start, end, mean, deviation):
    """The probability flow of Gaussian data, from one noise level to another, for x = x0 + level * epsilon."""
    return mean + (x - mean) * np.hypot(deviation, end) / np.hypot(deviation, start)


@pytest.mark.parametrize(
    ("class_name", "order", "config"),
    [
        (EULER, 0.9, {"final_sigmas_type": "sigma_min"}),
        (SINGLESTEP, 1.3, {"final_sigmas_type": "sigma_min", "lower_order_final": True}),
        (MULTISTEP, 1.6, {"final_sigmas_type": "sigma_min"}),
        (MULTISTEP, 2.3, {"final_sigmas_type": "sigma_min", "solver_order": 3}),
        (DEIS, 1.5, {}),
        (DEIS, 1.8, {"solver_order": 3}),
        (UNIPC, 1.3, {"final_sigmas_type": "sigma_min"}),
    ],
)
def test_convergence(class_name, order, config):
    """To the closed form, error ~ steps^-order; low-order starts and ends keep it under the solver's own order."""
    ours = scheduler(class_name, config | ({} if class_name == SINGLESTEP else {"timestep_spacing": "linspace"}))
    unit = 0 if CLASSES[class_name].variance_exploding else 1  # x = x0 + level * epsilon, divided by its norm or not
    x, mean, variance = draws(1)[0], 0.5, 0.49

    def epsilon(x, t):
        s = ours.schedule.level_at(t)
        return s / (variance + s**2) * (x * np.hypot(1, s) - mean)

    def error(n):
        table = ours.table(n)
        start, end = ours.schedule.level_at(table.t[0]), ours.schedule.levels[0]
        ended = run(table, start * x / np.hypot(1, start * unit), draws(n), epsilon)[-1] * np.hypot(1, end * unit)
        return np.abs(ended - exact_flow(start * x, start, end, mean, variance**0.5)).max()

    assert np.log(error(111) / error(333)) / np.log(3) > order


AYS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]  # "Align Your Steps", arXiv:2404.14507


@pytest.mark.parametrize(
    ("class_name", "timesteps", "config"),
    [
        *((c, t, {}) for c, s in CLASSES.items() if "timesteps" in s.takes for t in (AYS, [700], [999, 1, 0])),
        *((MULTISTEP, AYS, {"solver_order": 3, "final_sigmas_type": end}) for end in ("zero", "sigma_min")),
        (SINGLESTEP, AYS, {"solver_order": 3, "final_sigmas_type": "sigma_min"}),
        (EULER, [999, 500.5, 3.25], {"interpolation_type": "log_linear"}),
        (EULER, AYS, {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading"}),
        ("TCDScheduler", AYS, {"eta": 0.7}),
    ],
)
def test_given_timesteps(monkeypatch, class_name, timesteps, config):
    oracle, ours = Oracle(monkeypatch, class_name, config), scheduler(class_name, config)
    expected = oracle.set_timesteps(timesteps=timesteps)
    assert compare_tables(ours.table(timesteps=timesteps), oracle, expected) < TOLERANCE


@pytest.mark.parametrize("sigmas", [[14.6, 3.0, 0.4, 0.0], [20.0, 0.5], [7.0, 2.0, 0.3]])
@pytest.mark.parametrize("config", [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "leading"}, CONTINUOUS])
def test_given_sigmas(monkeypatch, sigmas, config):
    oracle, ours = Oracle(monkeypatch, EULER, config), scheduler(EULER, config)
    expected = oracle.set_timesteps(sigmas=sigmas)
    assert compare_tables(ours.table(sigmas=sigmas), oracle, expected) < TOLERANCE


def test_timesteps_and_sigmas_are_taken_where_diffusers_takes_them():
    for class_name, sampler in CLASSES.items():
        parameters = inspect.signature(getattr(diffusers, class_name).set_timesteps).parameters
        theirs = {name for name in ("timesteps", "sigmas") if name in parameters}
        assert set(sampler.takes) == theirs - ({"sigmas"} if class_name == UNIPC else set())  # UniPC: flows alone


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        ("DDPMScheduler", {"clip_sample_range": 0.8}),
        ("DDIMScheduler", {"clip_sample_range": 0.8}),
        ("DDIMScheduler", {"eta": 0.5}),
        (INVERSE, {"clip_sample_range": 0.8, "set_alpha_to_one": False}),
        ("HeunDiscreteScheduler", {"clip_sample_range": 0.8}),
        ("LCMScheduler", {"clip_sample_range": 0.8}),
    ],
)
def test_clipping(monkeypatch, class_name, config, prediction):
    assert_same(monkeypatch, class_name, config | {"clip_sample": True}, (prediction,), (1, 2, 10))
    on, off = (scheduler(class_name, config | {"clip_sample": clip}) for clip in (True, False))
    start, noise = draws(1, seed=1)[0], draws(20)
    assert difference(run(on.table(10), start, noise)[:1], run(off.table(10), start, noise)[:1]) > 0.01


@pytest.mark.parametrize("spacing", SPACINGS)
def test_runge_kutta_steps_of_pndm(monkeypatch, spacing):
    config = {"skip_prk_steps": False, "timestep_spacing": spacing}
    assert_same(monkeypatch, "PNDMScheduler", config, steps=(4, 5, 10, 50))


@pytest.mark.parametrize("spacing", spacings(INVERSE))
def test_an_inversion_goes_to_where_ddim_begins(spacing):
    """With a model that is the same everywhere DDIM then comes back; strength cuts both at the same level."""
    config = {"timestep_spacing": spacing, "set_alpha_to_one": False}
    ddim, inverse = scheduler("DDIMScheduler", config), scheduler(INVERSE, config)
    x, epsilon = draws(2)
    for strength in (1.0, 0.6, 0.1):
        there, back = inverse.table(10, strength), ddim.table(10, strength)
        assert len(there) == len(back)
        np.testing.assert_array_equal(there.marginals, back.marginals[::-1])
        inverted = run(there, x, draws(10), lambda x, t: epsilon)[-1]
        np.testing.assert_allclose(run(back, inverted, draws(10), lambda x, t: epsilon)[-1], x, atol=1e-9)
    with pytest.raises(ValueError, match="an inversion has none"):
        inverse.table(10, denoising_end=0.5)


def exact(ours, x0):
    """The epsilon of the one image that a model has ever seen."""
    unit = 0 if ours.sampler.variance_exploding else 1

    def epsilon(x, t):
        level = ours.schedule.with_finite_levels().level_at(t)
        return (x * np.hypot(1, level) - x0) / level  # x: after `cin`, of unit variance

    return epsilon, unit


DETERMINISTIC = sorted(name for name in NAMES if not re.search("ddpm|ancestral|sde|lcm|tcd|karras", name))


@pytest.mark.parametrize("end", [0.15, 0.35, 0.5, 0.65])
@pytest.mark.parametrize(("name", "config"), [*((name, {}) for name in DETERMINISTIC), ("pndm", PRK)])
def test_a_run_stops_where_the_state_is_a_sample(name, config, end):
    """x = alpha x0 + sigma epsilon, at the level where the run that goes on begins."""
    ours = from_config(name, **config)
    x0, noise = draws(2)
    epsilon, unit = exact(ours, x0)
    table, rest = ours.table(10, denoising_end=end), ours.table(10, denoising_start=end)
    level, left = (ours.schedule.level_at(part.t[0]) for part in (table, rest))
    x = (x0 + level * noise) / np.hypot(1, level * unit)
    ended = run(table, x, draws(len(table)), epsilon)[-1]
    np.testing.assert_allclose(ended, (x0 + left * noise) / np.hypot(1, left * unit), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"pndm"}))
def test_runs_stop_after_whole_steps(name):
    """Where a run stops, the rest begins, and both together have the rows of the whole. PNDM's start is taken anew."""
    ours = from_config(name)
    whole = ours.table(10)
    for end in np.linspace(0.1, 0.85, 16):
        done, rest = ours.table(10, denoising_end=end), ours.table(10, denoising_start=end)
        assert len(done) + len(rest) == len(whole)
        np.testing.assert_array_equal([*done.t, *rest.t], whole.t)
        np.testing.assert_array_equal(done.mix, whole.mix[: len(done)])


@pytest.mark.parametrize(
    "name", ["ddim", "pndm", "lms", "euler", "heun", "dpm2", "dpmpp_2m", "dpmpp_2s", "deis", "unipc"]
)
def test_marginals_are_where_a_model_that_knows_the_picture_leads(name):
    """Before every row and after the last, of deterministic samplers; diffusers' add_noise gives it at the timestep."""
    ours, (clean, noise) = from_config(name), draws(2)
    table = ours.table(8)
    expected = [m * clean + n * noise for m, n in table.marginals]
    states = run(table, expected[0], draws(len(table)), lambda x, t: noise)
    np.testing.assert_allclose(states, expected[1:], atol=1e-9)
    theirs = getattr(diffusers, ours.config["_class_name"]).from_config(dict(ours.config))
    theirs.set_timesteps(8)
    for i in range(0, len(table), 3):
        noised = theirs.add_noise(torch.tensor(clean), torch.tensor(noise), theirs.timesteps[i : i + 1])
        if name != "dpm2" or i % 2 == 0:  # which has no timestep halfway
            np.testing.assert_allclose(expected[i], noised, atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_of_a_run_meet_at_one_noise_level(name):
    for part in (0.25, 0.5, 0.77):
        first, rest = from_config(name).table(7, denoising_end=part), from_config(name).table(7, denoising_start=part)
        np.testing.assert_array_equal(first.marginals[-1], rest.marginals[0])


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "euler_ancestral", "lcm", "tcd"])
def test_marginals_of_a_run_from_a_picture_are_what_diffusers_starts_from(name):
    ours, (clean, noise) = from_config(name), draws(2)
    theirs = getattr(diffusers, ours.config["_class_name"]).from_config(dict(ours.config))
    theirs.set_timesteps(10)
    begin = theirs.timesteps[10 - int(10 * 0.6) :][:1]
    m, n = ours.table(10, 0.6).marginals[0]
    np.testing.assert_allclose(m * clean + n * noise, theirs.add_noise(*map(torch.tensor, (clean, noise)), begin), 1e-4)
