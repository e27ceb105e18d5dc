"""Merged LoRAs against PyTorch diffusers with PEFT: every spelling, several at once, the models back as they were."""

from functools import partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from compilations import compilations
from lora_files import ATTENTION, EVERYTHING, KOHYA_SDXL, SPELLINGS, factors, kohya, load_theirs, save
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from sdjax import CheckpointError, CLIPTextModel, UNet2DConditionModel
from sdjax.checkpoints import folder, ldm, lora
from sdjax.runtime import parallel
from sdjax.runtime.loras import Loras
from sdjax.runtime.network import Network

SDXL_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 24,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 24,
}


def fused(pipe, weights):
    """The pipeline with its LoRAs merged into plain modules."""
    pipe.set_adapters(list(weights), list(weights.values()))
    pipe.fuse_lora(components=[c for c in KOHYA_SDXL if hasattr(pipe, c)], adapter_names=list(weights))
    pipe.unload_lora_weights()
    return pipe


def load_ours(models, path):
    loras = Loras(models)
    loras.add("a", lora.read(path, loras.shapes, models["unet"].config.to_dict()))
    return loras


def torch_weights(model):
    """{PyTorch's name: array in PyTorch's layout} of all parameters."""
    variables = folder.variables(model)
    return {name: folder.torch_layout(name, np.asarray(variable[...])) for name, variable in variables.items()}


def assert_same_weights(models, pipe, base):
    """Every weight agrees with the pipeline's, and not because it still is the base's."""
    for component, model in models.items():
        theirs = getattr(pipe, component).state_dict()
        for name, value in torch_weights(model).items():
            reference = theirs.get(name, theirs.get(name.removeprefix("text_model.")))
            oracle.assert_close(value, reference.numpy(), 1e-6)
        assert any((value != base[component][name]).any() for name, value in torch_weights(model).items())


@pytest.fixture
def theirs(tmp_path):
    return oracle.pipeline(tmp_path, oracle.SD1)


@pytest.fixture
def ours(sd1_folder):
    return sd1_models(sd1_folder)


def sd1_models(path, dtype=jnp.float32):
    return {
        "unet": UNet2DConditionModel.from_pretrained(path, "unet", dtype=dtype),
        "text_encoder": CLIPTextModel.from_pretrained(path, "text_encoder", dtype=dtype),
    }


def values(models):
    return {component: torch_weights(model) for component, model in models.items()}


def torch_models(pipe):
    return {component: getattr(pipe, component) for component in KOHYA_SDXL if hasattr(pipe, component)}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_merged_weights_are_those_of_pytorch(spelling, theirs, ours, tmp_path):
    spelled, only = SPELLINGS[spelling]
    components = factors(torch_models(theirs), 3, only=only)
    path = save(tmp_path / "lora.safetensors", spelled(components))
    base = values(ours)
    load_theirs(theirs, path)
    load_ours(ours, path).set({"a": 0.7})
    assert_same_weights({component: ours[component] for component in components}, fused(theirs, {"a": 0.7}), base)


def spelled_twice(components):
    """As diffusers 0.22 wrote it."""
    tensors = SPELLINGS["PEFT"][0](components)
    return {f"{key.partition('.')[0]}.{key}": tensor for key, tensor in tensors.items()}


def test_prefixes_that_are_there_twice(theirs, ours, tmp_path):
    components = factors(torch_models(theirs), 3, only=EVERYTHING)
    once = load_ours(ours, save(tmp_path / "once.safetensors", SPELLINGS["PEFT"][0](components)))
    once.set({"a": 1.0})
    expected = values(ours)
    once.clear()
    load_ours(ours, save(tmp_path / "twice.safetensors", spelled_twice(components))).set({"a": 1.0})
    for component, weights in values(ours).items():
        assert all(np.array_equal(value, expected[component][name]) for name, value in weights.items())


NUMBERED = {
    "of 2022": (("Attention", "GEGLU"), ("attn1", "ff", "attn2", "norm1", "norm2", "norm3")),
    "of 2023": (("Attention", "GEGLU"), ("norm1", "attn1", "norm2", "attn2", "norm3", "ff")),
    "attention alone": (("Attention",), ("attn1", "attn2", "ff", "norm1", "norm2", "norm3")),
    "extended": (("Attention", "GEGLU", "ResnetBlock2D"), ("attn1", "ff", "attn2", "norm1", "norm2", "norm3")),
}


def layers_of(model, classes, order):
    """Linear layers and convolutions in these classes, in the order in which PyTorch has them, as cloneofsimo's did."""
    for block in model.modules():
        if type(block).__name__ == "BasicTransformerBlock":
            block._modules = {name: block._modules[name] for name in order} | block._modules
    for ancestor in model.modules():
        if type(ancestor).__name__ in classes:
            for module in ancestor.modules():
                if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                    yield module


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("kind", NUMBERED)
def test_numbered_layers_are_those_that_pytorch_has_in_that_order(kind, ending, theirs, ours, tmp_path):
    classes, order = NUMBERED[kind]
    base, generator = values(ours), torch.Generator().manual_seed(0)
    found = {
        "unet": layers_of(theirs.unet, classes, order),
        "text_encoder": layers_of(theirs.text_encoder, ("CLIPAttention",), ()),
    }
    tensors, lists = {}, {}
    for component, modules in found.items():
        for i, module in enumerate(modules):
            out, cin, *window = module.weight.shape
            up = torch.randn(out, 2, *(1 for _ in window), generator=generator)
            down = torch.randn(2, cin, *window, generator=generator) / module.weight[0].numel() ** 0.5
            module.weight += (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
            tensors |= {f"{component}:{i}:up": up, f"{component}:{i}:down": down}
            lists.setdefault(component, []).extend([up, down])
    if ending == "safetensors":
        files = [save(tmp_path / "lora.safetensors", tensors)]
    else:
        files = [tmp_path / "lora.pt", tmp_path / "lora.text_encoder.pt"]
        for path, pairs in zip(files, lists.values(), strict=True):
            torch.save(pairs, path)
    loras = Loras(ours)
    for path in files:
        loras.add(path.name, lora.read(path, loras.shapes, ours["unet"].config.to_dict()), 1.0)
    assert_same_weights(ours, theirs, base)


def test_numbered_layers_of_another_model_are_named(ours, tmp_path):
    tensors = {"unet:0:up": torch.ones(3, 1), "unet:0:down": torch.ones(1, 3)}
    with pytest.raises(CheckpointError, match="numbered layers that fit those of the unet in no order: 2 keys"):
        load_ours(ours, save(tmp_path / "lora.safetensors", tensors))
    torch.save([torch.ones(3, 1), torch.ones(1, 3), torch.ones(3)], tmp_path / "lora.pt")
    with pytest.raises(CheckpointError, match="numbered layers that fit those of the model in no order: 3 keys"):
        load_ours(ours, tmp_path / "lora.pt")


def test_changes_that_depend_on_the_weights_are_those_of_the_first_weights(ours, tmp_path):
    """W_0 + w_1 D_1(W_0) + w_2 D_2(W_0) + w_3 D_3 of DoRA, IA3 and differences, for weights, norms and biases."""
    name, base = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", values(ours)["unet"]
    first = base[f"{name}.weight"]
    down, up, vector, scale = oracle.normal(2, 16), oracle.normal(16, 2), oracle.normal(16), 1 + oracle.normal(16, 1)
    files = {
        "dora": {
            f"unet.{name}.lora_A.weight": down,
            f"unet.{name}.lora_B.weight": up,
            f"unet.{name}.dora_scale": scale,
        },
        "ia3": {f"unet.{name}.weight": vector, f"unet.{name}.on_input": np.ones(1)},
        "plain": {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up},
        "full": {"unet.conv_norm_out.w_norm": vector, "unet.conv_in.diff_b": vector, f"unet.{name}.diff": up @ down},
    }
    loras = Loras(ours)
    for label, tensors in files.items():
        path = save(tmp_path / "lora.safetensors", {key: torch.tensor(value) for key, value in tensors.items()})
        loras.add(label, lora.read(path, loras.shapes, ours["unet"].config.to_dict()))
    loras.set({"dora": 0.5, "ia3": -2.0, "plain": 3.0, "full": 0.25})
    merged = torch_weights(ours["unet"])
    adapted = first + up @ down
    adapted *= scale / np.linalg.norm(adapted, axis=1, keepdims=True)
    expected = first + 0.5 * (adapted - first) - 2.0 * first * vector + 3.25 * up @ down
    oracle.assert_close(merged[f"{name}.weight"], expected, 1e-6)
    for key in ("conv_norm_out.weight", "conv_in.bias"):
        oracle.assert_close(merged[key], base[key] + 0.25 * vector, 1e-6)
    changed = {key for key, value in merged.items() if not np.array_equal(value, base[key])}
    assert changed == {f"{name}.weight", "conv_norm_out.weight", "conv_in.bias"}
    loras.clear()
    assert all(np.array_equal(value, base[key]) for key, value in torch_weights(ours["unet"]).items())


@pytest.mark.parametrize("dtype, weight", [("float16", 1e6), ("float32", 3e38), ("bfloat16", 1e39)])
def test_values_that_are_not_finite_are_named_and_change_nothing(dtype, weight, theirs, sd1_folder, tmp_path):
    """The file is finite, and in float16 so is its product before the cast."""
    ours = sd1_models(sd1_folder, jnp.dtype(dtype))
    loras = load_ours(
        ours, save(tmp_path / "lora.safetensors", kohya(factors(torch_models(theirs), 2, only=EVERYTHING)))
    )
    loras.set({"a": 0.5})
    before = values(ours)
    message = rf"(unet|text_encoder): .*\.weight is not finite in {dtype} with LoRA 'a' with weight \de\+\d+"
    with pytest.raises(ValueError, match=message):
        loras.set({"a": weight})
    with pytest.raises(ValueError, match=r"'b' with weight \de"):
        loras.add("b", loras.layers["a"], weight)
    assert loras.weights == {"a": 0.5}
    for component, weights in values(ours).items():
        assert all(value.tobytes() == before[component][name].tobytes() for name, value in weights.items())
    loras.add("b", loras.layers["a"], 0.5)


@pytest.mark.parametrize("rslora", [False, True])
def test_alphas_in_the_metadata_of_diffusers(rslora, theirs, ours, tmp_path):
    configs = {}
    for component, model in torch_models(theirs).items():
        targets = ["to_q", "proj_in", "conv1"] if component == "unet" else ["q_proj", "fc1"]
        patterns = {"rank_pattern": {targets[1]: 5}, "alpha_pattern": {targets[0]: 7}}
        config = LoraConfig(
            r=4, lora_alpha=6, use_rslora=rslora, target_modules=targets, init_lora_weights=False, **patterns
        )
        inject_adapter_in_model(config, model)
        configs[component] = config.to_dict()
    theirs.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(theirs.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(theirs.text_encoder),
        unet_lora_adapter_metadata=configs["unet"],
        text_encoder_lora_adapter_metadata=configs["text_encoder"],
    )
    base = values(ours)
    load_ours(ours, tmp_path / lora.FILE_NAMES[0]).set({"a": 1.0})
    assert_same_weights(ours, fused(theirs, {"default": 1.0}), base)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_sdxl_in_both_layouts(layout, tmp_path):
    text = {**oracle.TEXT, "hidden_act": "gelu", "projection_dim": 24}
    parts = {
        "unet": oracle.unet(SDXL_UNET, 1),
        "text_encoder": oracle.text_encoder(text, 2),
        "text_encoder_2": oracle.randomised(CLIPTextModelWithProjection(CLIPTextConfig(**text)), 3),
    }
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    ours = {"unet": UNet2DConditionModel.from_pretrained(tmp_path, "unet", dtype=jnp.float32)}
    ours |= {name: CLIPTextModel.from_pretrained(tmp_path, name, dtype=jnp.float32) for name in parts if name != "unet"}
    others = dict.fromkeys(("vae", "tokenizer", "tokenizer_2", "scheduler"))
    pipe = diffusers.StableDiffusionXLPipeline(**parts, **others)
    rename = partial(ldm.unet_name, config=SDXL_UNET) if layout == "original" else str
    tensors = kohya(factors(parts, 2, only=(*ATTENTION, "proj_in", "conv1", "conv", "fc1")), KOHYA_SDXL, rename=rename)
    path = save(tmp_path / "lora.safetensors", tensors)
    base = values(ours)
    load_theirs(pipe, path)
    load_ours(ours, path).set({"a": 1.0})
    assert_same_weights(ours, fused(pipe, {"a": 1.0}), base)


@partial(jax.jit, static_argnums=0)
def predict(graph, params, *args):
    return graph.merge(params)(*args)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_several_with_weights_predict_what_pytorch_predicts_and_compile_nothing(theirs, ours, tmp_path):
    """Two LoRAs that meet in some layers, one with a negative weight, not merged in PyTorch; then other weights."""
    models = torch_models(theirs)
    loras = Loras(ours)
    files = {
        "a": kohya(factors(models, 3, seed=0)),
        "b": SPELLINGS["PEFT"][0](factors(models, 2, 1, ("to_q", "conv1", "q_proj"))),
    }
    for name, tensors in files.items():
        path = save(tmp_path / f"{name}.safetensors", tensors)
        load_theirs(theirs, path, name)
        loras.add(name, lora.read(path, loras.shapes, ours["unet"].config.to_dict()))
    sample, t, context = oracle.normal(2, 8, 8, 4), np.array([3, 900]), oracle.normal(2, 7, 24)
    ids = np.arange(14).reshape(2, 7)
    mesh = parallel.data_mesh(jax.devices()[:2])
    unet, text = Network(ours["unet"], mesh), Network(ours["text_encoder"], mesh)

    def predictions():
        return [
            np.asarray(predict(unet.graph, unet.params(), sample, t, context)),
            np.asarray(predict(text.graph, text.params(), ids)),
        ]

    with compilations() as compiled:
        before = predictions()
    assert any("predict" in name for name in compiled)  # the counter counts
    with torch.no_grad(), compilations() as compiled:
        for weights in ({"a": 0.8, "b": -1.5}, {"b": 0.4}, {"a": 1.0, "b": 0.0}):
            loras.set(weights)
            theirs.set_adapters(list(weights), list(weights.values()))
            assert loras.weights == {"a": 0.0, "b": 0.0} | weights
            x, states = predictions()
            reference = theirs.unet(oracle.nchw(sample), torch.tensor(t), torch.tensor(context)).sample
            oracle.assert_close(x, oracle.nhwc(reference), 1e-5)
            oracle.assert_close(states, theirs.text_encoder(torch.tensor(ids)).last_hidden_state.numpy(), 1e-5)
            assert np.abs(x - before[0]).max() > 0.01
        loras.clear()
        assert all(np.array_equal(*pair) for pair in zip(predictions(), before, strict=True))
    assert compiled == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_weights_come_back_bit_for_bit(dtype, theirs, sd1_folder, tmp_path):
    """Merged in float32 and cast once; restored by weight 0, by leaving the LoRA out and by clear."""
    ours = sd1_models(sd1_folder, jnp.dtype(dtype))
    components = factors(torch_models(theirs), 2, only=EVERYTHING)
    loras = load_ours(ours, save(tmp_path / "lora.safetensors", kohya(components, alpha=2.0)))
    loras.add("b", loras.layers["a"])
    base = values(ours)
    for back in ({"a": 0.0}, {}, None):
        loras.set({"a": 0.3, "b": -2.0})
        loras.set({"a": 0.3})
        for component, modules in components.items():
            merged = torch_weights(ours[component])
            for module, (down, up) in modules.items():
                before, after = base[component][f"{module}.weight"], merged[f"{module}.weight"]
                change = 0.3 * (up.flatten(1) @ down.flatten(1)).reshape(before.shape).numpy()
                assert after.dtype == before.dtype
                oracle.assert_close(
                    after, (before.astype(np.float32) + change).astype(dtype), 1e-6 if dtype == "float32" else 4e-3
                )
        loras.clear() if back is None else loras.set(back)
        for component, weights in values(ours).items():
            for name, value in weights.items():
                assert value.tobytes() == base[component][name].tobytes()
    assert loras.weights == {}


def test_bad_arguments_change_nothing(theirs, ours, tmp_path):
    path = save(tmp_path / "lora.safetensors", kohya(factors(torch_models(theirs), 2)))
    loras = load_ours(ours, path)
    loras.set({"a": 1.0})
    before = values(ours)
    with pytest.raises(ValueError, match="no LoRA 'b' is loaded; loaded: a"):
        loras.set({"a": 2.0, "b": 1.0})
    for weight in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight of LoRA 'a' must be a finite number"):
            loras.set({"a": weight})
    with pytest.raises(ValueError, match="a LoRA 'a' is loaded already; give this one another name="):
        loras.add("a", {})
    assert loras.weights == {"a": 1.0}
    for component, weights in values(ours).items():
        assert all(np.array_equal(value, before[component][name]) for name, value in weights.items())
    with pytest.raises(ValueError, match="no LoRA 'a' is loaded; loaded: none"):
        Loras(ours).set({"a": 1.0})
