"""Planning for TPUs: the programs are those that run, the counts those of closed forms, nothing is made or loaded."""

import importlib.util
import re
import shutil
import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import oracle
import pytest
from test_controlnet import SHARED
from test_image_to_image import picture

from sdjax.batch import memory
from sdjax.commands.main import main
from sdjax.models import LatentUpscalerConfig
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.plan import configs, counts, targets, traffic
from sdjax.plan.described import Described
from sdjax.plan.report import Plan
from sdjax.request import Request
from sdjax.request.values import pictures
from sdjax.runtime import lowering, parallel, programs

has_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the compiler of TPUs")

SIZE = {"width": 48, "height": 32}
PARAMETERS = {
    "sd15": {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863},
    "sd21": {"text_encoder": 340_387_840, "unet": 865_910_724, "vae": 83_653_863},
    "sdxl": {
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
        "vae": 83_653_863,
    },
}
"""Of the published models, as PyTorch counts them"""


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    return oracle.save_pipeline(tmp_path_factory.mktemp("xl"), oracle.SDXL)


@pytest.fixture(params=["sd1_folder", "xl_folder"])
def model(request):
    return str(request.getfixturevalue(request.param))


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_model_has_its_parameters(name):
    made = Described(configs.read(name)).parameter_bytes()
    assert made == {component: 2 * number for component, number in PARAMETERS[name].items()}


def test_the_latent_upscaler_is_not_planned():
    unet = {"_class_name": "UNet2DConditionModel", **LatentUpscalerConfig(in_channels=8).to_dict()}
    with pytest.raises(ValueError, match="8 channels where the VAE's latents have 4: it is for inpainting or another"):
        Described({**configs.read("sd15"), "unet": unet})


def test_a_folder_is_planned_as_the_pipeline_runs_it(model):
    """The very programs that a batch of a loaded pipeline is compiled to, from the configs alone."""
    mesh = parallel.data_mesh(jax.devices()[:2])
    pipe = StableDiffusionPipeline.from_pretrained(model, dtype=jnp.bfloat16, mesh=mesh)
    described = Described(configs.read(model))
    assert sum(described.parameter_bytes().values()) == memory.weight_bytes(pipe)
    item = Request("goose", negative_prompt="blue", guidance_scale=5.0, **SIZE)
    run = {program.name: program.lowered.as_text() for program in memory._programs(pipe, item, 2 * 3)}
    planned = {program.name: program.lowered.as_text() for program in described.lower(mesh, 3, **SIZE)}
    assert planned.pop("encode")
    assert planned.keys() == run.keys() == {"denoise", "decode"}
    assert all(planned[name] == run[name] for name in run)


@pytest.mark.parametrize("kind", ["ControlNetModel", "ControlNetUnionModel"])
def test_networks_are_planned_as_the_pipeline_runs_them(xl_folder, tmp_path, kind):
    """A ControlNet and a T2I-Adapter, each of which is shown one picture."""
    hint, adapter = {"conditioning_embedding_out_channels": (4, 6)}, {"channels": (16, 32, 32, 32)}
    union = {"num_trans_channel": 16, "num_proj_channel": 16} if "Union" in kind else {}
    shared = {name: oracle.SDXL.unet[name] for name in SHARED if name in oracle.SDXL.unet}
    getattr(diffusers, kind)(**shared, **hint, **union).save_pretrained(tmp_path / "net")
    adapter |= {"downscale_factor": 4, "adapter_type": "full_adapter_xl", "num_res_blocks": 1}
    diffusers.T2IAdapter(**adapter).save_pretrained(tmp_path / "adapter")
    places, mesh = (tmp_path / "net", tmp_path / "adapter"), parallel.data_mesh(jax.devices()[:2])
    networks = dict(zip(("controlnet", "adapter"), places, strict=True))
    pipe = StableDiffusionPipeline.from_pretrained(xl_folder, dtype=jnp.bfloat16, mesh=mesh, **networks)
    described = Described(configs.read(str(xl_folder), [str(places[0])], [str(places[1])]))
    shown = pictures("control_image", [picture(i, 48, 32) for i in (1, 2)])
    modes = (1,) if union else None
    item = Request("goose", negative_prompt="blue", guidance_scale=5.0, control_image=shown, control_mode=modes, **SIZE)
    run = {program.name: program.lowered.as_text() for program in memory._programs(pipe, item, 2 * 3)}
    planned = described.lower(mesh, 3, **SIZE)
    assert [program.name for program in planned] == ["encode", "control", "control", "denoise", "decode"]
    assert {program.name: program.lowered.as_text() for program in planned[3:]} == run


def test_weights_are_not_read(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    assert Described(configs.read(str(folder))).parameter_bytes() == Described(configs.read(model)).parameter_bytes()


def test_pictures_that_are_decoded_one_after_the_other_all_count(sd1_folder):
    """The body of a loop is counted once: the operations of a batch are those of a picture times its size."""
    described, mesh = Described(configs.read(str(sd1_folder))), parallel.data_mesh(jax.devices()[:1])
    side = int(programs.DECODED_PIXELS**0.5)

    def flops(batch: int) -> float:
        *_, decode = described.lower(mesh, batch, side, side)
        return decode.lowered.cost_analysis()["flops"] * counts.decodings(batch, side * side)

    assert flops(3) == pytest.approx(3 * flops(1), rel=0.01)


COUNT = counts.Count("denoise", 2e12, 2e10, 1e9, 10**8, 2 * 10**8, (), 1.0)
CHIP = targets.Chip(hbm=1e10, bandwidth=1e12, peak=1e14, axes=2)


def test_the_roofline_is_that_of_what_binds():
    assert COUNT.roofline(CHIP) == (2e12 / 1e14, "arithmetic")
    moving = counts.Count("encode", 1e9, 2e10, 1e9, 0, 10**7, (), 1.0)
    assert moving.roofline(CHIP) == (1e9 / 1e12, "HBM")
    plan = Plan(CHIP, 2, {"unet": 10**9}, [moving, COUNT], {"encode": 2, "denoise": 50})
    assert plan.seconds == pytest.approx(2 * 1e-3 + 50 * 2e-2)
    assert plan.total == 10**9 + 2 * 10**8
    assert plan.fits
    assert plan.estimated_batch == 64  # 2 x (9e9 - 1e9) / 2e8 = 80
    assert Plan(CHIP, 2, {"unet": 10**10}, [COUNT], {}).estimated_batch == 0


@pytest.mark.parametrize("first", [1, 8, 64])
@pytest.mark.parametrize(("most", "largest"), [(0.5, 0), (1, 1), (8, 8), (15, 8), (100, 64)])
def test_the_largest_batch_is_found_from_anywhere(first, most, largest):
    tried = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= most

    assert counts.largest_batch(fits, first) == largest
    assert len(set(tried)) == len(tried)


def fails(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *arguments])
    out, error = capsys.readouterr()
    assert exit_.value.code == 2
    assert not out
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("topology", ["v9:1x1", "v5e", "v5e:8", "v5e:0x1", "v5e:2x2x1", "v5p:2x2"])
def test_an_unknown_topology_is_refused(topology, capsys):
    assert topology in fails(capsys, "--topology", topology)


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "sdjax[plan]"' in fails(capsys)


def test_what_cannot_be_planned_is_refused(sd1_folder):
    described, mesh = Described(configs.read(str(sd1_folder))), parallel.data_mesh(jax.devices()[:1])
    with pytest.raises(ValueError, match="height must be a positive multiple of 4, not 30"):
        described.lower(mesh, 1, 32, 30)
    with pytest.raises(ValueError, match="one file"):
        configs.read("model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        configs.read(str(sd1_folder / "unet"))


def test_a_program_that_the_compiler_finds_too_large_does_not_fit():
    class Large:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM.\nmore")

    with pytest.raises(counts.DoesNotFit, match=r"^denoise: RESOURCE_EXHAUSTED: Ran out of memory on HBM\.$"):
        counts.count(lowering.LoweredProgram("denoise", Large(), []))


HLO = """
HloModule jit_f, is_scheduled=true

%fused_computation (param_0: bf16[8,128]) -> f32[8,128] {
  %param_0 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %convert.1 = f32[8,128]{1,0:T(8,128)} convert(%param_0)
}

ENTRY %main (x: bf16[16,128], w: bf16[128,128]) -> f32[8,128] {
  %x = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(1)
  %slice-start = ((bf16[16,128]{1,0:T(8,128)(2,1)}), bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:8]}
  %slice-done = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start)
  %dot = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} convolution(%slice-done, %w), dim_labels=bf_io->bf
  %pair = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}) fusion(%dot), kind=kLoop, calls=%fused_computation
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%pair), index=1
}
"""  # noqa: E501


def test_what_stays_on_the_chip_is_no_traffic():
    """Half of x, all of w, one of two results: not the product, nor what is inside a fusion."""
    assert traffic.hbm_bytes(HLO) == 2 * 8 * 128 + 2 * 128 * 128 + 4 * 8 * 128


LOOP = """
import os
from sdjax.plan import counts, targets
os.environ.update(targets.ENVIRONMENT)
import jax, jax.numpy as jnp
from sdjax.runtime import parallel
from sdjax.runtime.lowering import LoweredProgram

mesh = parallel.data_mesh(targets.devices("v5e", (1, 1)))
row = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=jax.NamedSharding(mesh, parallel.REPLICATED))
active = jax.ShapeDtypeStruct((8,), bool, sharding=row.sharding)

def segment(x, w, active):
    return jax.lax.scan(lambda x, on: (jax.lax.cond(on, lambda: x @ w, lambda: x), None), x, active)[0]

print(counts.count(LoweredProgram("loop", jax.jit(segment).lower(row, row, active), [])).flops)
"""


@has_compiler
def test_the_compiler_counts_the_body_of_a_loop_once():
    run = subprocess.run([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, text=True, check=True)
    assert float(run.stdout) == pytest.approx(2 * 256**3, rel=0.01)


@has_compiler
def test_a_plan_for_eight_chips(one_level_folder):
    """Parameters as in the config, the same programs on each of eight devices, and no collective."""
    call = "from sdjax.commands.main import main; main()"
    options = ["--topology", "v5e:2x4", "--model", str(one_level_folder), "--batch", "2", "--size", "32x32"]
    run = subprocess.run([sys.executable, "-c", call, "plan", *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "32x32, batch 2 on each of 8 v5e" in run.stdout
    parameters = sum(Described(configs.read(str(one_level_folder))).parameter_bytes().values())
    assert f"{parameters / 1e6:.2f} MB" in run.stdout
    assert re.search(r"^denoise +50 .*(HBM|arithmetic)", run.stdout, re.MULTILINE)
    assert re.search(r"^collectives +none$", run.stdout, re.MULTILINE)
    assert "compiling denoise" in run.stderr
