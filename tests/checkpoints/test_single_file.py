"""Single files against PyTorch diffusers: its models' state dicts, and its own conversion of the same file."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import oracle
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from original_layout import (
    PREFIXES,
    TINY,
    UNET,
    VAE,
    State,
    model,
    original,
    state,
    text_config,
    tiny,
    unet_config,
    vae_config,
    written,
    xl,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdjax.checkpoints import families, ldm, prediction, single_file, weights
from sdjax.checkpoints.errors import CheckpointError
from sdjax.sampling.config import from_config
from sdjax.text.vocabulary import clip_vocabulary

SD1_WIDTHS, ATTENDS = (320, 640, 1280, 1280), (True, True, True, False)
LINEAR = {"use_linear_projection": True, "layers_per_block": 2}
FULL = {
    "sd1": {
        "unet": unet_config(
            SD1_WIDTHS, ATTENDS, attention_head_dim=8, cross_attention_dim=768, layers_per_block=2, sample_size=64
        ),
        "vae": {**vae_config(128, 256, 512, 512), "sample_size": 512, "scaling_factor": 0.18215},
        "text_encoder": text_config(768, 12, "quick_gelu", 768),
    },
    "sd2": {
        "unet": unet_config(
            SD1_WIDTHS,
            ATTENDS,
            attention_head_dim=[5, 10, 20, 20],
            cross_attention_dim=1024,
            sample_size=96,
            upcast_attention=True,
            **LINEAR,
        ),
        "vae": {**vae_config(128, 256, 512, 512), "sample_size": 768, "scaling_factor": 0.18215},
        "text_encoder": text_config(1024, 23, "gelu", 512),
    },
    "sdxl": {
        "unet": unet_config(
            (320, 640, 1280),
            (False, True, True),
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            transformer_layers_per_block=[1, 2, 10],
            addition_time_embed_dim=256,
            sample_size=128,
            **LINEAR,
            **xl(2816),
        ),
        "vae": {**vae_config(128, 256, 512, 512), "sample_size": 1024, "scaling_factor": 0.13025},
        "text_encoder": text_config(768, 12, "quick_gelu", 768),
        "text_encoder_2": text_config(1280, 32, "gelu", 1280),
    },
    "refiner": {
        "unet": unet_config(
            (384, 768, 1536, 1536),
            (False, True, True, False),
            attention_head_dim=[6, 12, 24, 24],
            cross_attention_dim=1280,
            transformer_layers_per_block=4,
            addition_time_embed_dim=256,
            sample_size=128,
            **LINEAR,
            **xl(2560),
        ),
        "vae": {**vae_config(128, 256, 512, 512), "sample_size": 1024, "scaling_factor": 0.13025},
        "text_encoder_2": text_config(1280, 32, "gelu", 1280),
    },
}
"""The configs of the published folders: v1-5, 2-1, xl-base-1.0, xl-refiner-1.0."""

PARAMETERS = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}
PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "refiner": "StableDiffusionXLImg2ImgPipeline",
}
FAMILIES = tuple(PREFIXES)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' schedulers


def convert_open_clip(tensors: State, prefix: str, reference: dict[str, Any]) -> State:
    text_model = CLIPTextModel(CLIPTextConfig(**reference))
    return single_file_utils.convert_open_clip_checkpoint(text_model, tensors, prefix=prefix)


def converted(component: str, tensors: State, config: dict[str, Any], prefix: str) -> State:
    """What diffusers makes of the same state dict."""
    if component == "unet":
        return single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), config)
    if component == "vae":
        return single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), config)
    if prefix.endswith("transformer."):
        return single_file_utils.convert_ldm_clip_checkpoint(tensors)
    return convert_open_clip(tensors, prefix, config)


def assert_same(component: single_file.Component, reference: State) -> None:
    given = dict(component.tensors())
    assert given.keys() == reference.keys()
    for name, x in reference.items():
        np.testing.assert_array_equal(given[name], x.numpy(), err_msg=name)


def assert_describes(component: str, config: dict[str, Any], expected: dict[str, Any]) -> None:
    """The model that PyTorch builds from the config is the expected one."""
    if component.startswith("text_encoder"):
        cls = "CLIPTextModelWithProjection" if component == "text_encoder_2" else "CLIPTextModel"
        assert config["architectures"] == [cls]
        assert {k: config[k] for k in expected if k != "projection_dim"} == {
            k: v for k, v in expected.items() if k != "projection_dim"
        }
        return
    with torch.device("meta"):
        cls = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[component]
        given, wanted = cls.from_config(config).config, cls(**expected).config
    assert config["_class_name"] == cls.__name__
    left_open = {} if "sample_size" in expected else {"sample_size", "scaling_factor", "upcast_attention"}
    assert {k: listed(given[k]) for k in wanted if k not in left_open and k[0] != "_"} == {
        k: listed(v) for k, v in wanted.items() if k not in left_open and k[0] != "_"
    }


def listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_diffusers_name_and_value(family, tmp_path):
    models, tensors = tiny(family)
    file = single_file.read(written(tmp_path, tensors))
    assert file.components.keys() == models.keys()
    assert not file.missing
    for component, reference in models.items():
        assert_same(file.components[component], reference)
        prefix = PREFIXES[family].get(component, "")
        theirs = converted(component, tensors, TINY[family][component], prefix)
        assert theirs.keys() == reference.keys()
        assert all(torch.equal(theirs[name], x) for name, x in reference.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_of_tiny_models_are_told_from_shapes(family, tmp_path):
    file = single_file.read(written(tmp_path, tiny(family)[1]))
    for component, expected in TINY[family].items():
        assert_describes(component, file.components[component].config, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_files_have_the_published_configs(family, monkeypatch):
    """Names and shapes are those of PyTorch's full-size models; the values take no memory."""
    configs = {name: dict(config) for name, config in FULL[family].items()}
    if family == "sd2":  # the file has the layer that the folder leaves out
        configs["text_encoder"]["num_hidden_layers"] = 24
    with torch.device("meta"):
        models = {name: state(model(name, config)) for name, config in configs.items()}
        tensors = original(family, models, configs)
        if family == "sd2":
            tensors["cond_stage_model.model.text_projection"] = torch.empty(1024, 1024)
    if family in PARAMETERS:
        assert sum(x.numel() for name, x in tensors.items() if name.startswith(UNET)) == PARAMETERS[family]
    arrays = {name: np.broadcast_to(np.float16(0), x.shape) for name, x in tensors.items()}
    monkeypatch.setattr(weights, "open_tensors", lambda path: arrays)
    monkeypatch.setattr(weights, "read_metadata", lambda path: {})
    file = single_file.read(Path("full.safetensors"), "v_prediction" if family == "sd2" else None)
    assert file.components.keys() == FULL[family].keys()
    for component, expected in FULL[family].items():
        assert_describes(component, file.components[component].config, expected)
        given = {name: array.shape for name, array in file.components[component].tensors()}
        assert given == {
            name: tuple(x.shape)
            for name, x in models[component].items()
            if ".layers.23." not in name or family != "sd2"
        }
        if component in ("unet", "vae"):
            theirs = converted(component, tensors, expected, "")
            assert given == {name: tuple(x.shape) for name, x in theirs.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pipeline_is_told(family, tmp_path):
    file = single_file.read(written(tmp_path, tiny(family)[1]))
    listed = {name for name, entry in file.model_index.items() if isinstance(entry, list) and entry[0]}
    assert file.model_index["_class_name"] == PIPELINES[family]
    assert listed == {*file.components, *file.tokenizers, "scheduler"}
    assert file.scheduler["_class_name"] == file.model_index["scheduler"][1]
    pads = {"sd1": ["<|endoftext|>"], "sd2": ["!"], "sdxl": ["<|endoftext|>", "!"], "refiner": ["!"]}
    assert [*file.tokenizers.values()] == pads[family]
    assert file.model_index.get("requires_aesthetics_score", False) == (family == "refiner")
    assert file.model_index.get("force_zeros_for_empty_prompt", False) == (family == "sdxl")


def test_a_ckpt_is_read_like_safetensors(tmp_path):
    models, tensors = tiny("sd1")
    file = single_file.read(written(tmp_path, tensors, "model.ckpt"))
    assert_same(file.components["unet"], models["unet"])


@pytest.mark.parametrize(
    ("channels", "family", "expected"),
    [
        (9, "sd1", "StableDiffusionInpaintPipeline"),
        (9, "sdxl", "StableDiffusionXLInpaintPipeline"),
        (8, "sd1", "StableDiffusionInstructPix2PixPipeline"),
        (5, "sd2", "StableDiffusionDepth2ImgPipeline"),
    ],
)
def test_unets_with_more_channels(channels, family, expected, tmp_path):
    file = single_file.read(written(tmp_path, tiny(family, in_channels=channels)[1]))
    assert file.model_index["_class_name"] == expected
    assert file.components["unet"].config["in_channels"] == channels


@pytest.mark.parametrize(("channels", "said"), [(6, "unknown"), (7, "upscaler")])
def test_unets_that_no_pipeline_feeds(channels, said, tmp_path):
    with pytest.raises(CheckpointError, match=f"model.safetensors: .* {channels} channels.*{said}"):
        single_file.read(written(tmp_path, tiny("sd1", in_channels=channels)[1]))


def test_prediction_type_of_sd2(tmp_path):
    tensors = tiny("sd2")[1]
    norm = next(
        name for name in tensors if name.startswith(f"{UNET}output_blocks.5.1.") and name.endswith("norm1.bias")
    )
    for spread, expected, size in ((0.2, "v_prediction", 96), (0.05, "epsilon", 64)):
        tensors[norm] = spread * torch.tensor([-1.0, 1.0]).repeat(32)
        path = written(tmp_path / str(spread), tensors)
        file = single_file.read(path)
        assert file.scheduler["prediction_type"] == expected
        assert file.components["unet"].config["sample_size"] == size
        assert single_file.read(path, "epsilon").scheduler["prediction_type"] == "epsilon"
    inpainting = tiny("sd2", in_channels=9)[1] | {norm: torch.tensor([-1.0, 1.0]).repeat(32)}
    assert single_file.read(written(tmp_path, inpainting)).scheduler["prediction_type"] == "epsilon"


def test_prediction_type_of_the_other_families(tmp_path):
    tensors = tiny("sdxl")[1]
    plain = single_file.read(written(tmp_path / "plain", tensors)).scheduler
    marked = single_file.read(written(tmp_path / "v", tensors | {"v_pred": torch.zeros(0)})).scheduler
    zero = tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    zero = single_file.read(written(tmp_path / "zero", zero)).scheduler
    assert (plain["prediction_type"], marked["prediction_type"]) == ("epsilon", "v_prediction")
    assert marked["timestep_spacing"] == "leading"
    assert zero == {**marked, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert (
        single_file.read(written(tmp_path / "sd1", tiny("sd1")[1] | {"ztsnr": torch.zeros(0)})).scheduler["_class_name"]
        == "DDIMScheduler"
    )
    with pytest.raises(ValueError, match="v_predicted"):
        single_file.read(tmp_path / "plain" / "model.safetensors", "v_predicted")


YAMLS = {
    "v2-inference-v": 'model:\n  target: ldm.models.diffusion.ddpm.X\n  params:\n    parameterization: "v"\n',
    "v2-inference": "model:\n  target: ldm.models.diffusion.ddpm.X\n  params:\n    linear_start: 0.00085\n",
    "commented": "model:\n  params:\n    # parameterization: v\n    timesteps: 1000  # not parameterization: v\n",
    "eps": "model: {params: {'parameterization': eps}}\r\n",
    "x0": "    parameterization: 'x0'  # the clean latents\n",
    "sgm v": "scaling_config:\n  target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling\n",
    "sgm eps": "scaling_config:\n  target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling\n",
    "sgm edm": "  target: sgm.modules.diffusionmodules.denoiser_scaling.VScalingWithEDMcNoise\n",
    "no text": "\udcff",
}
V = {"modelspec.prediction_type": "v"}
STATED = (
    ({}, None, None),
    ({"format": "pt"}, None, None),
    (V, None, "v_prediction"),
    ({"modelspec.prediction_type": "epsilon"}, None, "epsilon"),
    ({"modelspec.prediction_type": " V_Prediction "}, None, "v_prediction"),
    ({"modelspec.prediction_type": "v-prediction"}, None, "v_prediction"),
    ({"modelspec.prediction_type": "sample"}, None, "sample"),
    ({"modelspec.prediction_type": ""}, None, None),
    ({"modelspec.predict_key": "v"}, None, "v_prediction"),
    ({"modelspec.predict_key": "v", "modelspec.prediction_type": "epsilon"}, None, "epsilon"),
    ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, None, "v_prediction"),
    ({"modelspec.architecture": "Stable-Diffusion-v2-768-V"}, None, "v_prediction"),
    ({"modelspec.architecture": "stable-diffusion-v2-512"}, None, "epsilon"),
    ({"modelspec.architecture": "stable-diffusion-xl-v1-base"}, None, None),
    ({"modelspec.architecture": "stable-diffusion-v2-512", **V}, None, "v_prediction"),
    ({}, "v2-inference-v", "v_prediction"),
    ({}, "v2-inference", None),
    ({}, "commented", None),
    ({}, "eps", "epsilon"),
    ({}, "x0", "sample"),
    ({}, "sgm v", "v_prediction"),
    ({}, "sgm eps", "epsilon"),
    ({}, "sgm edm", None),
    ({}, "no text", None),
    (V, "eps", "v_prediction"),
    ({"modelspec.architecture": "stable-diffusion-xl-v1-base"}, "v2-inference-v", "v_prediction"),
)


@pytest.mark.parametrize(("metadata", "yaml", "expected"), STATED)
def test_stated_prediction_types(metadata, yaml, expected, tmp_path):
    if yaml is not None:
        (tmp_path / "model.v1.yaml").write_bytes(YAMLS[yaml].encode(errors="surrogateescape"))
    (tmp_path / "v2-inference-v.yaml").write_text(YAMLS["v2-inference-v"])  # of no model
    assert prediction.stated(tmp_path / "model.v1.ckpt", metadata) == expected


def test_a_prediction_type_that_is_none_is_named_with_where_it_is(tmp_path):
    path = tmp_path / "model.ckpt"
    with pytest.raises(CheckpointError, match=r"model\.ckpt: its header states .* 'flow', none of .*--prediction-type"):
        prediction.stated(path, {"modelspec.prediction_type": "flow"})
    path.with_suffix(".yaml").write_text("parameterization: mu")
    with pytest.raises(CheckpointError, match=r"model\.yaml states the prediction type 'mu'"):
        prediction.stated(path, {})


def test_what_counts_of_what_is_stated(tmp_path):
    """The caller, the header, the .yaml, the keys, the guess: which for this one is v_prediction."""
    tensors, path = tiny("sd2")[1], tmp_path / "model.SAFETENSORS"

    def found(metadata=None, given=None):
        save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata)
        file = single_file.read(path, given)
        return file.scheduler["prediction_type"], file.components["unet"].config["sample_size"]

    assert found() == ("v_prediction", 96)
    path.with_suffix(".yaml").write_text(YAMLS["eps"])
    assert found() == ("epsilon", 64)
    tensors["v_pred"] = torch.zeros(0)
    assert found() == ("epsilon", 64)
    assert found(V) == ("v_prediction", 96)
    assert found(V, "sample") == ("sample", 64)
    assert found({"modelspec.prediction_type": "flow"}, "epsilon") == ("epsilon", 64)
    path.with_suffix(".yaml").unlink()
    assert found() == ("v_prediction", 96)


EULER_TRAILING = ("EulerDiscreteScheduler", "trailing", "epsilon")
ANCESTRAL_TRAILING = ("EulerAncestralDiscreteScheduler", "trailing", "epsilon")
XL_EULER = ("EulerDiscreteScheduler", "leading", "epsilon")
NAMES = (
    ("sd2", "sd_turbo.safetensors", "", EULER_TRAILING),
    ("sd2", "SD-Turbo-fp16.ckpt", "", EULER_TRAILING),
    ("sdxl", "sd_xl_turbo_1.0_fp16.safetensors", "", ANCESTRAL_TRAILING),
    ("sdxl", "sd_xl_turbo_1.0.safetensors", "", ANCESTRAL_TRAILING),
    ("sdxl", "model.safetensors", "SDXL-Turbo", ANCESTRAL_TRAILING),
    ("sdxl", "model.safetensors", "stable diffusion XL turbo 1.0", ANCESTRAL_TRAILING),
    ("sdxl", "sdxl_lightning_4step.safetensors", "", EULER_TRAILING),
    ("sdxl", "sdxl_lightning_1step_x0.safetensors", "", ("EulerDiscreteScheduler", "trailing", "sample")),
    ("sdxl", "koala-lightning-1b.safetensors", "", EULER_TRAILING),
    ("sdxl", "sd_xl_base_1.0.safetensors", "Stable Diffusion XL 1.0 Base", XL_EULER),
    ("sdxl", "dreamshaper_turbo.safetensors", "", XL_EULER),  # a mixture, which says nothing of its sampler
    ("sdxl", "sdxl_turbocharged.safetensors", "", XL_EULER),
    ("refiner", "sd_xl_turbo_refiner.safetensors", "", XL_EULER),
    ("sd1", "sd_turbo.safetensors", "", ("PNDMScheduler", None, "epsilon")),
)


@pytest.mark.parametrize(("family", "name", "title", "expected"), NAMES)
def test_distilled_models_are_known_by_their_published_names(family, name, title, expected):
    family = getattr(families, family.upper())
    found = families.distilled(family, {}, [name, title])
    scheduler = families.scheduler(family, found, found.get("prediction_type", "epsilon"), zero_snr=False)
    assert (scheduler["_class_name"], scheduler.get("timestep_spacing"), scheduler["prediction_type"]) == expected
    reference = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    reference.set_timesteps(1)
    assert from_config(scheduler).timesteps(1) == pytest.approx(reference.timesteps.numpy())
    assert (reference.timesteps[0] == 999) == (expected[1] == "trailing")


def test_a_distilled_model_in_one_file(tmp_path):
    """By the name of the file or the title in its header; its biases say nothing of SD-Turbo's prediction type."""
    tensors = {key: x.contiguous() for key, x in tiny("sd2")[1].items()}
    for name, title in (("sd_turbo.safetensors", ""), ("model.sft", "SD-Turbo")):
        save_file(tensors, tmp_path / name, {"modelspec.title": title})
        scheduler = single_file.read(tmp_path / name).scheduler
        assert (scheduler["_class_name"], scheduler["timestep_spacing"], scheduler["prediction_type"]) == EULER_TRAILING
    assert single_file.read(tmp_path / name, "v_prediction").scheduler["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("family", "pipeline"), [("sd1", "LatentConsistencyModelPipeline"), ("sdxl", PIPELINES["sdxl"])]
)
def test_a_unet_that_takes_the_guidance_scale_has_the_sampler_of_lcm(family, pipeline, tmp_path):
    file = single_file.read(written(tmp_path, tiny(family, time_cond_proj_dim=16)[1]))
    assert file.model_index["_class_name"] == pipeline
    assert file.scheduler == {
        "_class_name": "LCMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "original_inference_steps": 50,
        "set_alpha_to_one": True,
        "prediction_type": "epsilon",
    }
    reference = diffusers.LCMScheduler.from_config(file.scheduler)
    reference.set_timesteps(4)
    assert from_config(file.scheduler).timesteps(4).tolist() == reference.timesteps.tolist()


SMALLER = {
    "ssd-1b": (
        "sdxl",
        {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 5], [2, 1, 1], 1],
        },
    ),
    "vega": (
        "sdxl",
        {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, [1, 1], [2, 2]],
            "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
        },
    ),
    "koala-700m": (
        "sdxl",
        {"mid_block_type": None, "layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5]},
    ),
    "koala-1b": ("sdxl", {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]}),
    "bk-sdm-small": ("sd1", {"mid_block_type": None}),
    "bk-sdm-tiny": ("sd1", {"mid_block_type": None, **unet_config((32, 64), (True, True))}),
    "bk-sdm-v2-small": ("sd2", {"mid_block_type": None, "layers_per_block": 1}),
}


@pytest.mark.parametrize("name", SMALLER)
def test_smaller_models(name, tmp_path):
    family, changes = SMALLER[name]
    models, tensors = tiny(family, **changes)
    file = single_file.read(written(tmp_path, tensors))
    assert file.model_index["_class_name"] == PIPELINES[family]
    assert_same(file.components["unet"], models["unet"])
    config = file.components["unet"].config
    expected = model("unet", {**TINY[family]["unet"], **changes}).config
    with torch.device("meta"):
        given = UNet2DConditionModel.from_config(config)
    assert {k: v.shape for k, v in given.state_dict().items()} == {k: v.shape for k, v in models["unet"].items()}
    for field in ("mid_block_type", "cross_attention_dim", "attention_head_dim", "use_linear_projection"):
        assert listed(given.config[field]) == listed(expected[field])


def test_the_middle_of_ssd_1b_has_its_published_name(tmp_path):
    """One residual block: middle_block.0. KOALA-700M has none."""
    middles = {
        name: {key.split(".")[3] for key in tiny(*pair[:1], **pair[1])[1] if key.startswith(f"{UNET}middle_block.")}
        for name, pair in SMALLER.items()
        if name in ("ssd-1b", "koala-700m", "koala-1b")
    }
    assert middles == {"ssd-1b": {"0"}, "koala-700m": set(), "koala-1b": {"0", "1", "2"}}


def test_state_of_a_training_is_left_alone(tmp_path):
    models, tensors = tiny("sd1")
    extra = (
        "model_ema.diffusion_modelinput_blocks00weight",
        "model_ema.decay",
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_one_minus_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "posterior_log_variance_clipped",
        "logvar",
        "first_stage_model.loss.discriminator.main.0.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.logit_scale",
        "cond_stage_model.transformer.text_projection.weight",
        "denoiser.sigmas",
    )
    file = single_file.read(written(tmp_path, tensors | {name: torch.zeros(1) for name in extra}))
    for component, reference in models.items():
        assert_same(file.components[component], reference)


def test_unknown_keys_are_all_listed(tmp_path):
    strange = {"banana": torch.zeros(1), f"{UNET}peel.weight": torch.zeros(2), f"{VAE}stem": torch.zeros(2)}
    with pytest.raises(CheckpointError) as error:
        single_file.read(written(tmp_path, tiny("sd1")[1] | strange))
    assert "model.safetensors: 3 tensors" in str(error.value)
    assert all(name in str(error.value) for name in strange)


def test_a_missing_model_is_named(tmp_path):
    tensors = {name: x for name, x in tiny("sdxl")[1].items() if "embedders.1" not in name and not name.startswith(VAE)}
    file = single_file.read(written(tmp_path, tensors))
    assert file.missing == ("vae", "text_encoder_2")
    assert file.model_index["_class_name"] == "StableDiffusionXLPipeline"


def test_a_missing_tensor_that_tells_of_the_config_is_named(tmp_path):
    tensors = tiny("sd1")[1]
    del tensors[f"{UNET}middle_block.1.proj_in.weight"]
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: its unet has no mid_block.attentions.0.proj_in.weight"
    ):
        single_file.read(written(tmp_path, tensors))


@pytest.mark.parametrize("prefix", ["", UNET])
def test_a_unet_alone(prefix, tmp_path):
    models, tensors = tiny("sdxl")
    tensors = {prefix + name.removeprefix(UNET): x for name, x in tensors.items() if name.startswith(UNET)}
    file = single_file.read(written(tmp_path, tensors))
    assert [*file.components] == ["unet"]
    assert_same(file.components["unet"], models["unet"])
    assert file.missing == ("vae", "text_encoder", "text_encoder_2")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_model_alone_with_diffusers_names(component, tmp_path):
    models, _ = tiny("sd1")
    file = single_file.read(written(tmp_path, models[component]))
    assert [*file.components] == [component]
    assert_same(file.components[component], models[component])
    assert_describes(component, file.components[component].config, TINY["sd1"][component])


@pytest.mark.parametrize("prefix", ["", VAE])
def test_a_vae_alone_leaves_its_scaling_factor_open(prefix, tmp_path):
    models, tensors = tiny("sd1")
    tensors = {prefix + name.removeprefix(VAE): x for name, x in tensors.items() if name.startswith(VAE)}
    file = single_file.read(written(tmp_path, tensors | {"loss.logvar": torch.zeros(1)}))
    assert [*file.components] == ["vae"]
    assert_same(file.components["vae"], models["vae"])
    assert "scaling_factor" not in file.components["vae"].config
    assert (file.model_index, file.scheduler, file.missing) == ({}, {}, ("unet",))


def test_a_tiny_vae_alone(tmp_path):
    module = oracle.randomised(
        AutoencoderTiny(
            encoder_block_out_channels=(16, 16, 16),
            decoder_block_out_channels=(16, 16, 16),
            num_encoder_blocks=(1, 2, 3),
            num_decoder_blocks=(3, 2, 1),
        )
    )
    vae = single_file.read(written(tmp_path, state(module))).components["vae"]
    assert_same(vae, state(module))
    given = AutoencoderTiny.from_config(vae.config).config
    assert all(listed(given[k]) == listed(module.config[k]) for k in vae.config if k[0] != "_")
    assert vae.config["_class_name"] == "AutoencoderTiny"


def test_a_second_text_encoder_alone(tmp_path):
    """As clip_g.safetensors is: wide, with a projection."""
    config = text_config(832, 1, "gelu", 64, vocab_size=100, max_position_embeddings=20)
    reference = state(oracle.randomised(model("text_encoder_2", config)))
    file = single_file.read(written(tmp_path, reference | {"logit_scale": torch.zeros(())}))
    assert [*file.components] == ["text_encoder_2"]
    assert_same(file.components["text_encoder_2"], reference)
    assert_describes("text_encoder_2", file.components["text_encoder_2"].config, config)


def test_old_text_encoders_lack_a_prefix(tmp_path):
    models, tensors = tiny("sd1")
    tensors = {name.replace("transformer.text_model.", "transformer."): x for name, x in tensors.items()}
    file = single_file.read(written(tmp_path, tensors))
    assert_same(file.components["text_encoder"], models["text_encoder"])


def test_sd2_in_the_layout_of_sgm(tmp_path):
    """As sd_turbo.safetensors is: the text encoder is where the refiner has its own."""
    models, tensors = tiny("sd2")
    tensors = {name.replace("cond_stage_model.", "conditioner.embedders.0."): x for name, x in tensors.items()}
    file = single_file.read(written(tmp_path, tensors))
    assert file.model_index["_class_name"] == "StableDiffusionPipeline"
    assert_same(file.components["text_encoder"], models["text_encoder"])


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias", "SD 3"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
        ("model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
        ("clip_txt_mapper.weight", "Stable Cascade"),
        ("adaln_single.linear.weight", "PixArt"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "load_lora"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "load_lora"),
        ("emb_params", "load_textual_inversion"),
        ("<cat>", "load_textual_inversion"),
        ("clip_g", "load_textual_inversion"),
        ("model.diffusion_model.label_emb.weight", "upscaler"),
        ("depth_model.model.pretrained.cls_token", "depth"),
        ("edm_mean", "Playground"),
        ("model.diffusion_model.input_blocks.1.0.time_stack.in_layers.0.weight", "Stable Video Diffusion"),
        ("model.diffusion_model.middle_block.1.proj_in.weight.absmax", "quantised"),
    ],
)
def test_what_is_not_supported_is_named(key, said, tmp_path):
    with pytest.raises(CheckpointError) as error:
        single_file.read(written(tmp_path, tiny("sd1")[1] | {key: torch.zeros(1)}))
    assert str(tmp_path / "model.safetensors") in str(error.value)
    assert said in str(error.value)
    assert key in str(error.value)


def test_a_file_of_something_else(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: no UNet, VAE or text encoder among its 1 tensors: x"
    ):
        single_file.read(written(tmp_path, {"x": torch.zeros(1)}))


def test_names_that_a_model_has_not():
    with pytest.raises(ValueError, match=r"down_blocks\.9"):
        ldm.unet_name("down_blocks.9.resnets.0.conv1.weight", TINY["sd1"]["unet"])


@pytest.mark.parametrize(
    ("family", "name", "published"),
    [
        ("sd1", "time_embedding.linear_2.bias", "time_embed.2.bias"),
        ("sd1", "down_blocks.0.downsamplers.0.conv.weight", "input_blocks.3.0.op.weight"),
        ("sd1", "down_blocks.3.resnets.1.time_emb_proj.weight", "input_blocks.11.0.emb_layers.1.weight"),
        ("sd1", "mid_block.resnets.1.conv2.weight", "middle_block.2.out_layers.3.weight"),
        ("sd1", "up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
        ("sd1", "up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
        ("sd1", "up_blocks.3.resnets.2.conv_shortcut.bias", "output_blocks.11.0.skip_connection.bias"),
        ("sdxl", "down_blocks.1.attentions.0", "input_blocks.4.1"),
        ("sdxl", "up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("sdxl", "add_embedding.linear_2", "label_emb.0.2"),
    ],
)
def test_names_of_published_checkpoints(family, name, published):
    assert ldm.unet_name(name, FULL[family]["unet"]) == published


@pytest.mark.parametrize("family", FAMILIES)
def test_schedulers_are_ones_that_there_are(family, tmp_path):
    for keys in ({}, {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}):
        file = single_file.read(written(tmp_path, tiny(family)[1] | keys))
        assert from_config(file.scheduler)


def test_vocabulary_of_clip(tmp_path):
    vocab, merges = clip_vocabulary()
    assert (len(vocab), len(merges)) == (49408, 48894)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges)
    published = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("a photo of a cat")["input_ids"] == published
    assert [vocab[token] for token in ("!", "!</w>", "<|startoftext|>", "<|endoftext|>")] == [0, 256, 49406, 49407]
