"""sdjax.models.unet against PyTorch diffusers: its blocks, and whole UNets."""

import diffusers
import numpy as np
import oracle
import pytest
import torch
from diffusers.models.unets import unet_2d_blocks as reference_blocks
from flax import nnx
from oracle import SD1, SD2, assert_close, nchw, nhwc, normal, ported, randomised, run

from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.folder import torch_name
from sdjax.models import UNet2DConditionConfig, UNet2DConditionModel, unet_blocks
from sdjax.models.attention import Context

CONFIG = UNet2DConditionConfig(
    block_out_channels=(8, 16, 24),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=2,
    norm_num_groups=4,
    cross_attention_dim=(12, 12, 12),
    attention_head_dim=(2, 4, 6),
    transformer_layers_per_block=(1, 2, 1),
)
RESNETS = {"temb_channels": 32, "resnet_groups": 4, "resnet_eps": 1e-5}
TEMB = normal(2, 32, seed=9)


def attentions(level: int) -> dict[str, int]:
    return {
        "num_attention_heads": CONFIG.attention_head_dim[level],
        "cross_attention_dim": CONFIG.cross_attention_dim[level],
        "transformer_layers_per_block": CONFIG.transformer_layers_per_block[level],
    }


def context(level: int) -> np.ndarray:
    return normal(2, 5, CONFIG.cross_attention_dim[level], seed=8)


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("cross", [True, False])
def test_down_block(level, cross):
    cin, cout = (8, 8, 16)[level], CONFIG.block_out_channels[level]
    kind = reference_blocks.CrossAttnDownBlock2D if cross else reference_blocks.DownBlock2D
    reference = randomised(
        kind(
            in_channels=cin,
            out_channels=cout,
            num_layers=2,
            add_downsample=level < 2,
            **RESNETS,
            **(attentions(level) if cross else {}),
        )
    )
    block = ported(lambda **kw: unet_blocks.DownBlock(CONFIG, level, cross=cross, **kw), reference)
    x = normal(2, 5, 6, cin)
    conditions = {"encoder_hidden_states": torch.from_numpy(context(level))} if cross else {}
    _, expected = reference(nchw(x), torch.from_numpy(TEMB), **conditions)
    outputs = run(block, x, TEMB, Context(context(level)))
    assert len(outputs) == len(expected) == 2 + (level < 2)
    for output, wanted in zip(outputs, expected, strict=True):
        assert_close(output, nhwc(wanted))


def test_mid_block():
    reference = randomised(reference_blocks.UNetMidBlock2DCrossAttn(in_channels=24, **RESNETS, **attentions(2)))
    block = ported(lambda **kw: unet_blocks.MidBlock(CONFIG, **kw), reference)
    x = normal(2, 3, 4, 24)
    expected = reference(nchw(x), torch.from_numpy(TEMB), encoder_hidden_states=torch.from_numpy(context(2)))
    assert_close(run(block, x, TEMB, Context(context(2))), nhwc(expected))


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("cross", [True, False])
def test_up_block(level, cross):
    above, cout, below = (8, 8, 16)[level], CONFIG.block_out_channels[level], (16, 24, 24)[level]
    kind = reference_blocks.CrossAttnUpBlock2D if cross else reference_blocks.UpBlock2D
    reference = randomised(
        kind(
            in_channels=above,
            out_channels=cout,
            prev_output_channel=below,
            num_layers=3,
            add_upsample=level > 0,
            **RESNETS,
            **(attentions(level) if cross else {}),
        )
    )
    block = ported(lambda **kw: unet_blocks.UpBlock(CONFIG, level, cross=cross, **kw), reference)
    x = normal(2, 3, 4, below)
    skips = [normal(2, 3, 4, channels, seed=i) for i, channels in enumerate((above, cout, cout))]
    finer = normal(2, 5, 8, 8)
    conditions = {"encoder_hidden_states": torch.from_numpy(context(level))} if cross else {}
    size = {"upsample_size": (5, 8)} if level else {}
    expected = reference(nchw(x), tuple(map(nchw, skips)), torch.from_numpy(TEMB), **conditions, **size)
    assert_close(run(block, x, [finer, *skips], TEMB, Context(context(level))), nhwc(expected))


THREE_LEVELS = {
    **oracle.UNET,
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
XL = {
    **oracle.UNET,
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (0, 1, 2),
    "attention_head_dim": (1, 2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
REFINER = {
    **XL,
    "block_out_channels": (8, 16, 24, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 2,
    "attention_head_dim": (1, 2, 4, 6),
    "projection_class_embeddings_input_dim": 20 + 5 * 8,
}
LCM = {**SD1.unet, "time_cond_proj_dim": 10}
UNCLIP = {**SD2.unet, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 18}
COMPRESSED = {
    "ssd-1b": {
        **XL,
        "layers_per_block": 2,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": (1, (2, 2), (2, 2)),
        "reverse_transformer_layers_per_block": ((2, 2, 3), (2, 1, 1), 1),
    },
    "koala-700m": {**XL, "mid_block_type": None, "transformer_layers_per_block": (1, 2, 3)},
    "koala-1b": {**XL, "transformer_layers_per_block": (1, 2, 3)},
    "bk-sdm-tiny": {
        **SD1.unet,
        "mid_block_type": None,
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    },
    "bk-sdm-small": {**SD1.unet, "mid_block_type": None},
    "a middle of its own depth": {
        **SD2.unet,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "transformer_layers_per_block": ((1,), (3,)),
        "reverse_transformer_layers_per_block": ((2, 1), 2),
    },
}
"""The shapes of models that were made smaller and distilled, with fewer layers in a transformer"""
CONFIGS = {
    "sd1": SD1.unet,
    "sd2": SD2.unet,
    "lists": {
        **THREE_LEVELS,
        "layers_per_block": (1, 2, 1),
        "transformer_layers_per_block": (1, 2, 1),
        "attention_head_dim": (2, 4, 3),
        "only_cross_attention": (True, False, True),
        "use_linear_projection": True,
    },
    "other values": {
        **SD1.unet,
        "only_cross_attention": True,
        "in_channels": 9,
        "out_channels": 5,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 0.01,
        "block_out_channels": (12, 16),
    },
    "xl": XL,
    "refiner": REFINER,
    "lcm": LCM,
    "xl, lcm, other waves": {**XL, "time_cond_proj_dim": 6, "flip_sin_to_cos": False, "freq_shift": 1},
    "depth": {**SD2.unet, "in_channels": 5},
    "upscaler": {**SD2.unet, "in_channels": 7, "num_class_embeds": 30},
    "number": {**SD2.unet, "class_embed_type": "timestep", "num_class_embeds": 30},
    "unclip": UNCLIP,
    **COMPRESSED,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_unet_with_a_time_step_per_image_and_an_odd_size(tmp_path, name):
    check_unet(tmp_path, CONFIGS[name], (9, 13), np.float32([3, 17.5]))


def test_unet_with_one_time_step_and_an_even_size(tmp_path):
    check_unet(tmp_path, SD1.unet, (8, 8), np.int32(981))


def check_unet(folder, config, size, t):
    reference = oracle.unet(config)
    reference.save_pretrained(folder)
    model = UNet2DConditionModel.from_pretrained(folder)
    sample, states = normal(2, *size, reference.config.in_channels), normal(2, 7, 24, seed=1)
    given = conditions(model.config)
    tensors = {name: None if value is None else torch.from_numpy(value) for name, value in given.items()}
    beside = {name: tensors.pop(name) for name in ("timestep_cond", "class_labels")}
    prediction = reference(
        nchw(sample), torch.as_tensor(t), torch.from_numpy(states), **beside, added_cond_kwargs=tensors
    )
    expected = nhwc(prediction.sample)
    assert expected.std() > 0.1
    assert_close(run(model, sample, t, states, **given), expected)


@pytest.mark.parametrize("name", ["sd1", "lists", "xl", "other values", "upscaler"])
def test_an_image_with_several_texts_is_that_image_with_each(tmp_path, name):
    oracle.unet(CONFIGS[name]).save_pretrained(tmp_path)
    model = UNet2DConditionModel.from_pretrained(tmp_path)
    sample, t = normal(2, 9, 13, model.config.in_channels), np.float32([3, 17.5])
    states = normal(6, 7, 24, seed=1)
    given = {name: value for name, value in conditions(model.config).items() if value is not None}
    samples, ts = (np.concatenate([value] * 3) for value in (sample, t))
    repeated = {name: np.concatenate([value] * 3) for name, value in given.items()}
    together = run(model, sample, t, states, **repeated)
    assert_close(together, run(model, samples, ts, states, **repeated))


def test_what_texts_have_in_common_is_computed_once(tmp_path):
    """conv_in, the first residual block, and self-attention up to the residual of the first cross-attention"""
    oracle.unet(SD1.unet).save_pretrained(tmp_path)
    model = UNet2DConditionModel.from_pretrained(tmp_path)
    states = normal(2, 7, 24)

    def flops(images):
        arguments = (model, normal(images, 16, 16, 4), np.float32([3] * images), states)
        return nnx.jit(lambda model, *a: model(*a)).lower(*arguments).compile().cost_analysis()["flops"]

    assert flops(1) < 0.95 * flops(2)


def conditions(config: UNet2DConditionConfig) -> dict[str, np.ndarray | None]:
    """What the config asks for beside text states, for two images and a pooled state of 20 channels."""
    ids = np.random.default_rng(4).uniform(0, 1024, (2, config.time_ids(20))) if config.addition_embed_type else None
    return {
        "text_embeds": None if ids is None else normal(2, 20, seed=2),
        "time_ids": None if ids is None else ids.round().astype(np.float32),
        "timestep_cond": normal(2, config.time_cond_proj_dim, seed=3) if config.time_cond_proj_dim else None,
        "class_labels": normal(2, 18, seed=5)
        if config.takes_vector
        else np.int32([0, 29])
        if config.takes_number
        else None,
    }


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (XL, {"text_embeds": None}, "text_embeds: this model needs it"),
        (XL, {"time_ids": None}, "time_ids: this model needs it"),
        (XL, {"timestep_cond": normal(2, 6)}, "timestep_cond: this model does not take it"),
        (LCM, {"timestep_cond": None}, "timestep_cond: this model needs it"),
        (SD1.unet, {"text_embeds": normal(2, 20)}, "text_embeds: this model does not take it"),
        (SD1.unet, {"time_ids": normal(2, 6)}, "time_ids: this model does not take it"),
        (REFINER, {"time_ids": normal(2, 6)}, "20 channels and 6 time_ids of 8 make 68 channels; this model takes 60"),
        (SD1.unet, {"class_labels": np.int32([1, 2])}, "class_labels: this model does not take it"),
        (UNCLIP, {"class_labels": None}, "class_labels: this model needs it"),
        (UNCLIP, {"class_labels": normal(2, 20)}, "class_labels of 20 channels; this model takes 18"),
        (XL, {"text_embeds": normal(2, 24)}, "24 channels and 6 time_ids of 8 make 72 channels; this model takes 68"),
    ],
)
def test_a_condition_too_few_or_too_many_is_named(config, changes, message):
    config = UNet2DConditionConfig.from_dict(config)
    inputs = normal(2, 8, 8, 4), np.int32(3), normal(2, 7, 24)
    values = conditions(config) | changes
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: UNet2DConditionModel(config, rngs=oracle.OneKey())(*inputs, **values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, "down_block_types='AttnDownBlock2D'"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type='UNetMidBlock2DSimpleCrossAttn'"),
        ({"act_fn": "gelu", "class_embed_type": "identity"}, "act_fn='gelu', class_embed_type='identity'"),
        ({"class_embed_type": "projection"}, "'projection' without projection_class_embeddings_input_dim"),
        ({"dual_cross_attention": True}, "dual_cross_attention=True"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"addition_embed_type": "image"}, "addition_embed_type='image'"),
        (
            {"addition_embed_type": "text_time", "addition_time_embed_dim": 8},
            "'text_time' without projection_class_embeddings_input_dim",
        ),
        ({"num_attention_heads": 8}, "num_attention_heads=8"),
        ({"reverse_transformer_layers_per_block": (1,)}, "entry for each level.*'reverse_transformer_layers_per_block"),
        ({"transformer_layers_per_block": ((2,), 1)}, r"CrossAttnUpBlock2D of 2 layers with transformer depths \(2,\)"),
        ({"transformer_layers_per_block": ((1, 2), 1)}, r"CrossAttnDownBlock2D of 1 layers .* depths \(1, 2\)"),
        ({"attention_head_dim": (2, 4, 8)}, "entry for each level.*'attention_head_dim': 3"),
    ],
)
def test_what_is_not_implemented_is_named(changes, message):
    with pytest.raises(CheckpointError, match=message):
        UNet2DConditionModel.from_config(SD1.unet | changes)


def test_the_whole_config_of_diffusers_is_understood():
    config = UNet2DConditionConfig.from_dict(dict(oracle.unet(SD2.unet).config))
    assert config.attention_head_dim == (2, 8)
    assert config.use_linear_projection


# what the Hub has in unet/config.json
SD_1_5 = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SD_2_1 = {
    **SD_1_5,
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
LATER = {  # what diffusers writes from 0.19 on
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dropout": 0.0,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": None,
}
SDXL_BASE = {
    **SD_2_1,
    **LATER,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
PUBLISHED = {
    "sd-inpainting": SD_1_5 | {"in_channels": 9},
    "sd-2-depth": SD_2_1 | {"in_channels": 5, "sample_size": 32},
    "sd-x4-upscaler": SD_2_1
    | {
        "attention_head_dim": 8,
        "block_out_channels": [256, 512, 512, 1024],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "in_channels": 7,
        "num_class_embeds": 1000,
        "only_cross_attention": [True, True, True, False],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "sd-unclip-h": SD_2_1 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
    "sd-turbo": {**SD_2_1, **LATER, "sample_size": 64},
    "lcm-dreamshaper": {**SD_1_5, **LATER, "sample_size": 96, "time_cond_proj_dim": 256},
    "sdxl-base": SDXL_BASE,
    "sdxl-refiner": SDXL_BASE
    | {
        "attention_head_dim": [6, 12, 24, 24],
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "projection_class_embeddings_input_dim": 2560,
        "transformer_layers_per_block": 4,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "ssd-1b": SDXL_BASE
    | {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "koala-700m": SDXL_BASE
    | {"layers_per_block": 1, "mid_block_type": None, "transformer_layers_per_block": [0, 2, 5]},
    "bk-sdm-small": SD_1_5 | {"layers_per_block": 1, "mid_block_type": None},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_parameters_of_the_checkpoint(name):
    """Names and sizes, without memory for them."""
    with torch.device("meta"):
        reference = diffusers.UNet2DConditionModel.from_config(PUBLISHED[name]).state_dict()
    config = UNet2DConditionConfig.from_dict(PUBLISHED[name])
    model = UNet2DConditionModel.described(config, "float32")
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    assert {torch_name(keys): leaf.size for keys, leaf in parameters} == {k: v.numel() for k, v in reference.items()}


@pytest.mark.parametrize(("name", "ids"), [("sdxl-base", 6), ("sdxl-refiner", 5)])
def test_number_of_time_ids(name, ids):
    assert UNet2DConditionConfig.from_dict(PUBLISHED[name]).time_ids(1280) == ids
