"""What is read from a LoRA file: which weight each spelling means, its scale, and what is refused."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from sdjax import CheckpointError
from sdjax.checkpoints import lora

UNET_CONFIG = {"layers_per_block": 2, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
BLOCK = "down_blocks.0.attentions.1.transformer_blocks.0"
LAYER = "text_model.encoder.layers.0"
SHAPES = {
    "unet": {
        "conv_in.weight": (8, 4, 3, 3),
        "conv_out.weight": (4, 8, 3, 3),
        "time_embedding.linear_1.weight": (32, 8),
        "down_blocks.0.attentions.1.proj_in.weight": (8, 8, 1, 1),
        f"{BLOCK}.attn1.to_out.0.weight": (8, 8),
        f"{BLOCK}.attn2.to_k.weight": (8, 768),
        f"{BLOCK}.ff.net.0.proj.weight": (64, 8),
        "down_blocks.0.downsamplers.0.conv.weight": (8, 8, 3, 3),
        "mid_block.resnets.1.time_emb_proj.weight": (16, 32),
        "up_blocks.0.upsamplers.0.conv.weight": (16, 16, 3, 3),
    },
    "text_encoder": {f"{LAYER}.self_attn.out_proj.weight": (6, 6), f"{LAYER}.mlp.fc1.weight": (24, 6)},
    "text_encoder_2": {f"{LAYER}.mlp.fc1.weight": (24, 6), "text_projection.weight": (5, 6)},
}
KOHYA = ("{}.lora_down.weight", "{}.lora_up.weight")
PEFT = ("{}.lora_A.weight", "{}.lora_B.weight")
FIRST = ("{}_lora.down.weight", "{}_lora.up.weight")
LAST = ("{}.lora.down.weight", "{}.lora.up.weight")
LINEAR = ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight")


def factors(shape, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator)
    return down, torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)


def entries(module, shape, ends=KOHYA, **kw):
    return {end.format(module): factor for end, factor in zip(ends, factors(shape, **kw), strict=True)}


def read(tmp_path, tensors, shapes=SHAPES, metadata=None):
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, metadata=metadata)
    return lora.read(path, shapes, UNET_CONFIG)


def only(layers):
    [(component, parameters)] = layers.items()
    [(parameter, layer)] = parameters.items()
    return component, parameter, layer


@pytest.mark.parametrize(
    "module, ends, component, parameter",
    [
        ("lora_unet_conv_in", KOHYA, "unet", "conv_in"),
        ("lora_unet_down_blocks_0_attentions_1_proj_in", KOHYA, "unet", "down_blocks.0.attentions.1.proj_in"),
        ("lora_unet_input_blocks_0_0", KOHYA, "unet", "conv_in"),
        ("lora_unet_out_2", KOHYA, "unet", "conv_out"),
        ("lora_unet_time_embed_0", KOHYA, "unet", "time_embedding.linear_1"),
        ("lora_unet_input_blocks_2_1_transformer_blocks_0_ff_net_0_proj", KOHYA, "unet", f"{BLOCK}.ff.net.0.proj"),
        ("lora_unet_input_blocks_3_0_op", KOHYA, "unet", "down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_middle_block_2_emb_layers_1", KOHYA, "unet", "mid_block.resnets.1.time_emb_proj"),
        ("lora_unet_output_blocks_2_1_conv", KOHYA, "unet", "up_blocks.0.upsamplers.0.conv"),
        ("diffusion_model.input_blocks.2.1.proj_in", KOHYA, "unet", "down_blocks.0.attentions.1.proj_in"),
        ("lycoris_conv_in", KOHYA, "unet", "conv_in"),
        ("unet.conv_in", PEFT, "unet", "conv_in"),
        ("unet.unet.conv_in", PEFT, "unet", "conv_in"),  # diffusers 0.22
        (f"text_encoder.text_encoder.{LAYER}.mlp.fc1", PEFT, "text_encoder", f"{LAYER}.mlp.fc1"),
        ("unet.base_model.model.conv_in", PEFT, "unet", "conv_in"),
        ("unet.conv_in", ("{}.lora_A.default.weight", "{}.lora_B.default.weight"), "unet", "conv_in"),
        (f"unet.{BLOCK}.attn1.to_out.0", LAST, "unet", f"{BLOCK}.attn1.to_out.0"),
        (f"unet.{BLOCK}.attn1.processor.to_out", FIRST, "unet", f"{BLOCK}.attn1.to_out.0"),
        (f"{BLOCK}.attn2.processor.to_k", FIRST, "unet", f"{BLOCK}.attn2.to_k"),
        (f"lora_te_{LAYER.replace('.', '_')}_mlp_fc1", KOHYA, "text_encoder", f"{LAYER}.mlp.fc1"),
        (f"lora_te1_{LAYER.replace('.', '_')}_mlp_fc1", KOHYA, "text_encoder", f"{LAYER}.mlp.fc1"),
        (f"lora_te2_{LAYER.replace('.', '_')}_mlp_fc1", KOHYA, "text_encoder_2", f"{LAYER}.mlp.fc1"),
        ("lora_te2_text_projection", KOHYA, "text_encoder_2", "text_projection"),
        (f"text_encoder.{LAYER}.self_attn.to_out", FIRST, "text_encoder", f"{LAYER}.self_attn.out_proj"),
        (f"text_encoder.{LAYER}.self_attn.out_proj", LINEAR, "text_encoder", f"{LAYER}.self_attn.out_proj"),
        ("text_encoder.encoder.layers.0.mlp.fc1", PEFT, "text_encoder", f"{LAYER}.mlp.fc1"),
        (f"text_encoder_2.{LAYER}.mlp.fc1", LINEAR, "text_encoder_2", f"{LAYER}.mlp.fc1"),
        (f"text_encoders.clip_g.transformer.{LAYER}.mlp.fc1", KOHYA, "text_encoder_2", f"{LAYER}.mlp.fc1"),
    ],
)
def test_every_spelling_means_one_weight(module, ends, component, parameter, tmp_path):
    shape = SHAPES[component][f"{parameter}.weight"]
    found, name, layer = only(read(tmp_path, entries(module, shape, ends)))
    assert (found, name, layer.scale) == (component, f"{parameter}.weight", 1.0)
    down, up = factors(shape)
    assert np.array_equal(layer.down, down.numpy())
    assert np.array_equal(layer.up, up.flatten(1).numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_alpha_over_rank_in_a_pickle_of_any_dtype(dtype, tmp_path):
    tensors = entries("lora_unet_conv_in", (8, 4, 3, 3), rank=4) | {"lora_unet_conv_in.alpha": torch.tensor(3.0)}
    path = tmp_path / "lora.bin"
    torch.save({key: tensor.to(dtype) for key, tensor in tensors.items()}, path)
    _, _, layer = only(lora.read(path, SHAPES, UNET_CONFIG))
    assert layer.scale == 0.75
    assert layer.down.dtype.name == str(dtype).removeprefix("torch.")
    down = tensors["lora_unet_conv_in.lora_down.weight"].to(dtype).float()
    assert np.array_equal(layer.down.astype(np.float32), down.numpy())


def test_a_linear_layer_and_a_convolution_of_one_pixel_are_the_same(tmp_path):
    """SD 2 has linear projections where SD 1 has convolutions; files of one are used with the other."""
    convolution, linear = "down_blocks.0.attentions.1.proj_in", f"{BLOCK}.attn1.to_out.0"
    tensors = entries(f"unet.{convolution}", (8, 8)) | entries(f"unet.{linear}", (8, 8, 1, 1))
    layers = read(tmp_path, tensors)["unet"]
    assert layers[f"{convolution}.weight"].down.shape == (2, 8, 1, 1)
    assert layers[f"{linear}.weight"].down.shape == (2, 8)


def test_lora_mid_is_the_convolution_between(tmp_path):
    """LyCORIS: a 1x1, a 3x3 and a 1x1 convolution in a row, as PyTorch runs them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"down": (3, 4, 1, 1), "mid": (3, 3, 3, 3), "up": (8, 3, 1, 1)}
    given = {part: torch.randn(shape, generator=generator) for part, shape in shapes.items()}
    tensors = {f"lora_unet_conv_in.lora_{part}.weight": tensor for part, tensor in given.items()}
    _, _, layer = only(read(tmp_path, tensors | {"lora_unet_conv_in.alpha": torch.tensor(6.0)}))
    assert layer.scale == 2.0
    x = torch.randn(1, 4, 9, 9, generator=generator)
    chained = torch.nn.functional.conv2d(x, given["down"])
    chained = torch.nn.functional.conv2d(torch.nn.functional.conv2d(chained, given["mid"]), given["up"])
    merged = torch.nn.functional.conv2d(x, torch.einsum("or,rihw->oihw", *map(torch.tensor, (layer.up, layer.down))))
    assert (merged - chained).abs().max() < 1e-5 * chained.abs().max()


def test_of_a_file_in_both_layouts_that_of_diffusers_counts(tmp_path):
    tensors = entries("lora_unet_input_blocks_3_0_op", (8, 8, 3, 3), seed=1)
    tensors |= entries("lora_unet_down_blocks_0_downsamplers_0_conv", (8, 8, 3, 3), seed=0)
    _, _, layer = only(read(tmp_path, tensors))
    assert np.array_equal(layer.down, factors((8, 8, 3, 3), seed=0)[0].numpy())


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_of_a_folder_that_peft_wrote(rslora, tmp_path):
    """adapter_config.json with an alpha for all and others for some, against the scaling that PEFT computes."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_in = torch.nn.Conv2d(4, 8, 3)
            self.conv_out = torch.nn.Conv2d(8, 4, 3)
            self.time_embedding = torch.nn.ModuleDict({"linear_1": torch.nn.Linear(8, 32)})

    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["conv_in", "conv_out", "linear_1"],
        rank_pattern={"conv_out": 2},
        alpha_pattern={"^conv_in": 10, "linear_1": 3},
    )
    model = get_peft_model(Net(), config)
    model.save_pretrained(tmp_path)
    layers = lora.read(tmp_path / "adapter_model.safetensors", SHAPES, UNET_CONFIG)["unet"]
    modules = {
        name.split("base_model.model.")[-1]: m.scaling for name, m in model.named_modules() if hasattr(m, "scaling")
    }
    assert {name.removesuffix(".weight"): layer.scale for name, layer in layers.items()} == pytest.approx(
        {name: scaling["default"] for name, scaling in modules.items()}
    )
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: PEFT keeps .* in adapter_config.json"):
        lora.read(tmp_path / "adapter_model.safetensors", SHAPES, UNET_CONFIG)


def test_metadata_without_a_component_is_for_all(tmp_path):
    metadata = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 5})}
    assert only(read(tmp_path, entries("conv_in", (8, 4, 3, 3), PEFT), metadata=metadata))[2].scale == 2.5


@pytest.mark.parametrize(
    "keys, message",
    [
        (["unet.conv_in.oft_R.weight"], "not supported: OFT layers in another spelling than that of LyCORIS"),
        (["base_model.model.conv_in.ia3_l"], "not supported: IA3 layers of PEFT"),
        (
            ["lora_unet_conv_in.lambda_layer", "lora_unet_conv_in.q_layer.weight"],
            "not supported: T-LoRA layers, whose rank depends on the noise level: 2 keys",
        ),
        (["<s1>"], "not supported: embeddings"),
        (["lora_te3_encoder_block_0.lora_down.weight"], "not supported: layers of Flux or SD 3"),
        (["transformer.blocks.0.attn.to_q.lora_A.weight"], "not supported: layers of Flux or SD 3"),
        (["lora_unet_double_blocks_0_img_mlp_0.lora_down.weight"], "not supported: layers of Flux or SD 3"),
        (["bundle_emb.cat.clip_l"], "not supported: embeddings"),
        (["emb_params"], "not supported: a textual inversion, which is no LoRA"),
        (["model.diffusion_model.out.2.weight"], "not supported: a whole checkpoint, which is no LoRA"),
        (["unet.conv_in.weight"], r"no keys of a LoRA: 1 keys: unet.conv_in.weight \[1\]"),
        (["lora_unet_conv_in.alpha"], "incomplete: nothing but alpha: 1 keys: lora_unet_conv_in.alpha"),
        (["lora_unet_conv_9.lora_down.weight"], "for no weight of the unet: 1 keys: lora_unet_conv_9.lora_down.weight"),
        (["conv_9.lora_A.weight"], "for no weight of the unet or the text_encoder or the text_encoder_2"),
    ],
)
def test_what_is_no_lora_of_this_model_is_named(keys, message, tmp_path):
    good = entries("lora_unet_conv_out", (4, 8, 3, 3))
    with pytest.raises(CheckpointError, match=message) as error:
        read(tmp_path, good | {key: torch.zeros(1) for key in keys})
    assert str(tmp_path / "lora.safetensors") in str(error.value)


def test_one_error_lists_everything_by_kind(tmp_path):
    tensors = entries("lora_unet_conv_out", (4, 9, 3, 3)) | entries("lora_unet_conv_in", (8, 4, 3, 3))
    tensors |= entries("unet.conv_in", (8, 4, 3, 3), PEFT) | entries("lora_te_layers", (6, 6))
    nan = entries("lora_te1_text_model_encoder_layers_0_mlp_fc1", (24, 6))
    tensors |= {key: torch.full_like(tensor, float("nan")) for key, tensor in nan.items()}
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, tensors)
    for line in (
        "of another shape than the weight: 2 keys: lora_unet_conv_out",
        "second change of the same weight of the unet: 2 keys",
        "for no weight of the text_encoder: 2 keys: lora_te_layers",
        "not finite (NaN or infinity): 2 keys: lora_te1_text_model_encoder_layers_0_mlp_fc1",
    ):
        assert line in str(error.value)


def test_a_lora_of_another_family_is_named(tmp_path):
    tensors = entries("lora_unet_input_blocks_2_1_transformer_blocks_0_attn2_to_k", (8, 2048))
    tensors |= entries("lora_te2_text_model_encoder_layers_0_mlp_fc1", (24, 6))
    shapes = {component: SHAPES[component] for component in ("unet", "text_encoder")}
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, tensors, shapes)
    assert "for SDXL (text states of width 2048), and this is SD 1 (text states of width 768)" in str(error.value)
    assert "for the text_encoder_2, which this model does not have: 2 keys" in str(error.value)


@pytest.mark.parametrize("part", [".hada_w1_b", ".diff", ".lora_A.weight"])
def test_the_family_is_named_for_every_kind_that_shows_it(part, tmp_path):
    tensors = {f"unet.{BLOCK}.attn2.to_k{part}": torch.zeros(8, 1024), "unet.conv_in.alpha": torch.tensor(1.0)}
    with pytest.raises(CheckpointError, match=r"for SD 2 .* and this is SD 1"):
        read(tmp_path, tensors)


def test_metadata_that_is_no_object_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="lora_adapter_metadata in its header is no JSON object"):
        read(tmp_path, entries("conv_in", (8, 4, 3, 3), PEFT), metadata={"lora_adapter_metadata": "[1]"})


@pytest.mark.parametrize(
    "config", [{"r": 2, "lora_alpha": "5"}, {"alpha_pattern": ["conv_in"]}, {"alpha_pattern": {"(": 1}, "r": 2}]
)
def test_a_config_that_gives_no_scale_is_named(tmp_path, config):
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    with pytest.raises(
        CheckpointError,
        match=r"PEFT's config gives no scale \(.*conv_in|in its header: (lora_alpha='5'|alpha_pattern=)",
    ):
        read(tmp_path, entries("conv_in", (8, 4, 3, 3), PEFT), metadata=metadata)


def test_an_empty_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"lora.safetensors: .*\n *no LoRA layers"):
        read(tmp_path, {})
