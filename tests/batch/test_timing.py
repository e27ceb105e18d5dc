"""How long a job takes: the parts that are counted are those that run."""

import jax
import numpy as np
import pytest

from sdjax.batch import timing
from sdjax.batch.prepare import lay_out, prepare
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.runtime import parallel, programs

SECONDS = {"row": (1e0, 1e2), "renewal": (1e4, 1e6)}  # without and with guidance: digits of their own


@pytest.fixture(scope="module")
def pipe(one_level_folder):
    return StableDiffusionPipeline.from_pretrained(one_level_folder, mesh=parallel.data_mesh(jax.devices()[:1]))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("cache_interval", [None, 2, 3])
@pytest.mark.parametrize("interval", [None, (0.4, 4.0), (1e3, 1e4)])
def test_what_is_counted_is_what_runs(pipe, tmp_path, monkeypatch, guidance_scale, cache_interval, interval):
    call = {"num_inference_steps": 11, "guidance_scale": guidance_scale, "cache_interval": cache_interval}
    spent = []

    def deep_features(mesh, graph, params, x, row, conditions, *_):
        spent.append(SECONDS["renewal"][len(conditions) - 1])
        return (x,) * len(conditions)

    def denoise_segment(mesh, graph, params, state, denoised, segment, keys, conditions, guidance, *_):
        spent.append(SECONDS["row"][len(conditions) - 1] * int(segment[0].sum()))
        return state, denoised

    monkeypatch.setattr(programs, "deep_features", deep_features)
    monkeypatch.setattr(programs, "denoise_segment", denoise_segment)
    pipe("goose", "", guidance_interval=interval, output_type="latent", **call)

    def measured(ready, group, item, pictures, *, is_guided):
        renewal = 0.0 if group.cache_interval is None else SECONDS["renewal"][is_guided]
        return timing._Cost(0.0, SECONDS["row"][is_guided], renewal)

    monkeypatch.setattr(timing, "_measured", measured)
    text = interval and f"{interval[0]}:{interval[1]}"
    ready = prepare([{"prompt": "goose", "seed": "0:3", "guidance_interval": text} | call], tmp_path, model=pipe)
    assert 3 / timing.rate(ready, lay_out(ready, batch=1)) == pytest.approx(3 * sum(spent))


PICTURE = np.zeros((16, 16, 3), np.uint8)
FORMS = (
    {},
    {"guidance_interval": "0.4:4"},
    {"cache_interval": 2},
    {"guidance_scale": 1},
    {"image": PICTURE, "mask_image": PICTURE, "strength": 0.3},
)


@pytest.mark.parametrize("line", FORMS)
def test_a_rate_is_measured_for_every_form(pipe, tmp_path, line):
    ready = prepare([{"prompt": "goose", "guidance_scale": 5} | line], tmp_path, model=pipe)
    assert timing.rate(ready, lay_out(ready, batch=1)) > 0
