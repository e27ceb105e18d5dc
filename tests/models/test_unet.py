"""sdjax.models.unet against PyTorch diffusers: its blocks, and whole UNets."""

import numpy as np
import oracle
import pytest
import torch
from diffusers.models.unets import unet_2d_blocks as reference_blocks
from oracle import SD1, SD2, assert_close, nchw, nhwc, normal, ported, randomised, run

from sdjax.checkpoints.errors import CheckpointError
from sdjax.models import UNet2DConditionConfig, UNet2DConditionModel, unet

CONFIG = UNet2DConditionConfig(
    block_out_channels=(8, 16, 24),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=2,
    norm_num_groups=4,
    cross_attention_dim=(10, 12, 14),
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
    block = ported(lambda **kw: unet.DownBlock(CONFIG, level, cross=cross, **kw), reference)
    x = normal(2, 5, 6, cin)
    conditions = {"encoder_hidden_states": torch.from_numpy(context(level))} if cross else {}
    _, expected = reference(nchw(x), torch.from_numpy(TEMB), **conditions)
    outputs = run(block, x, TEMB, context(level))
    assert len(outputs) == len(expected) == 2 + (level < 2)
    for output, wanted in zip(outputs, expected, strict=True):
        assert_close(output, nhwc(wanted))


def test_mid_block():
    reference = randomised(reference_blocks.UNetMidBlock2DCrossAttn(in_channels=24, **RESNETS, **attentions(2)))
    block = ported(lambda **kw: unet.MidBlock(CONFIG, **kw), reference)
    x = normal(2, 3, 4, 24)
    expected = reference(nchw(x), torch.from_numpy(TEMB), encoder_hidden_states=torch.from_numpy(context(2)))
    assert_close(run(block, x, TEMB, context(2)), nhwc(expected))


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
    block = ported(lambda **kw: unet.UpBlock(CONFIG, level, cross=cross, **kw), reference)
    x = normal(2, 3, 4, below)
    skips = [normal(2, 3, 4, channels, seed=i) for i, channels in enumerate((above, cout, cout))]
    finer = normal(2, 5, 8, 8)
    conditions = {"encoder_hidden_states": torch.from_numpy(context(level))} if cross else {}
    size = {"upsample_size": (5, 8)} if level else {}
    expected = reference(nchw(x), tuple(map(nchw, skips)), torch.from_numpy(TEMB), **conditions, **size)
    assert_close(run(block, x, [finer, *skips], TEMB, context(level)), nhwc(expected))


THREE_LEVELS = {
    **oracle.UNET,
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
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
    expected = nhwc(reference(nchw(sample), torch.as_tensor(t), torch.from_numpy(states)).sample)
    assert expected.std() > 0.1
    assert_close(run(model, sample, t, states), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, "down_block_types='AttnDownBlock2D'"),
        ({"mid_block_type": None}, "mid_block_type=None"),
        ({"act_fn": "gelu", "class_embed_type": "timestep"}, "class_embed_type='timestep', act_fn='gelu'"),
        ({"dual_cross_attention": True}, "dual_cross_attention=True"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
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
