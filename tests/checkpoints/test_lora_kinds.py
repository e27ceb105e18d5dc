"""Every kind of change that a LoRA file holds, against PEFT's merged weights and against what its layers compute."""

import copy

import jax
import numpy as np
import oracle
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from sdjax import CheckpointError
from sdjax.checkpoints import folder, lora
from sdjax.runtime.adapted import adapted

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


class Net(torch.nn.Module):
    """Modules with names of a UNet: a convolution, one of a pixel, a linear layer, a square one, a norm."""

    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(6, 16, 3)
        self.conv_out = torch.nn.Conv2d(16, 12, 1)
        self.time_embedding = torch.nn.ModuleDict(
            {"linear_1": torch.nn.Linear(12, 16), "linear_2": torch.nn.Linear(16, 16)}
        )
        self.conv_norm_out = torch.nn.GroupNorm(4, 16)


UNET_CONFIG = {"layers_per_block": 1, "up_block_types": ("UpBlock2D", "UpBlock2D")}
MODULES = ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"]
TARGETS = {"target_modules": ["conv_in", "conv_out", "linear_1", "linear_2"], "init_weights": False, "r": 3}
LORA = {key: value for key, value in TARGETS.items() if key != "init_weights"} | {"init_lora_weights": False}
PATTERNS = {"rank_pattern": {"conv_in": 2}, "alpha_pattern": {"linear_1": 7}}
PEFT = {
    "LoHa": peft.LoHaConfig(alpha=5, **TARGETS),
    "LoHa, patterns": peft.LoHaConfig(alpha=5, **TARGETS, **PATTERNS),
    "LoHa, Tucker": peft.LoHaConfig(alpha=5, use_effective_conv2d=True, **TARGETS),
    "LoKr": peft.LoKrConfig(alpha=5, **TARGETS | {"r": 1}),
    "LoKr, Tucker, both factors products": peft.LoKrConfig(
        alpha=5, use_effective_conv2d=True, decompose_both=True, **TARGETS | {"r": 1}
    ),
    "LoKr, whole, patterns": peft.LoKrConfig(alpha=5, **TARGETS | {"r": 50}, **PATTERNS | {"rank_pattern": {}}),
    "DoRA": peft.LoraConfig(lora_alpha=5, use_dora=True, **LORA),
    "DoRA, rank-stabilised": peft.LoraConfig(lora_alpha=5, use_dora=True, use_rslora=True, **LORA, **PATTERNS),
    "LoRA with biases": peft.LoraConfig(lora_alpha=5, lora_bias=True, **LORA),
}


def net():
    return oracle.randomised(Net(), 1)


def shapes(module):
    return {"unet": {name: tuple(value.shape) for name, value in module.named_parameters()}}


def read(path, module):
    return lora.read(path, shapes(module), UNET_CONFIG)["unet"]


def merged(module, tensors, path):
    """A copy of the module with a file of these tensors of kohya's spelling merged."""
    spelled = {}
    for key, tensor in tensors.items():
        name, _, part = key.partition(":")
        spelled[f"lora_unet_{name.replace('.', '_')}.{part}"] = tensor.contiguous()
    save_file(spelled, path / "lora.safetensors")
    changed = copy.deepcopy(module)
    parameters = dict(changed.named_parameters())
    for name, change in read(path / "lora.safetensors", module).items():
        parameters[name].data += torch.tensor(checked(name, change, parameters[name].numpy()))
    return changed


def checked(name, change, weight):
    """change(weight), computed by NumPy, which a traced function of JAX agrees with."""
    value, before = change(weight), folder.flax_layout(name, weight)
    traced = jax.jit(lambda params: adapted(params, {"a": {name: change}}))({name: before})[name]
    oracle.assert_close(folder.torch_layout(name, np.asarray(traced)), weight + value, 1e-6)
    return value


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def applied(module, name):
    """What a layer of the module makes of noise, and that noise."""
    layer = module.get_submodule(name)
    x = random(2, 6, 5, 5) if name == "conv_in" else random(2, 16, 5, 5) if name == "conv_out" else random(2, 12)
    return layer(x), x


def assert_change(ours, theirs, base):
    oracle.assert_close(ours, theirs, 1e-5)
    assert np.abs(np.asarray(theirs) - np.asarray(base)).max() > 1e-2


@pytest.mark.parametrize("kind", PEFT)
def test_adapters_of_peft(kind, tmp_path):
    base = net()
    model = peft.get_peft_model(copy.deepcopy(base), PEFT[kind])
    for name, parameter in model.named_parameters():
        if "default" in name:
            parameter.data = 0.6 * random(*parameter.shape) + ("magnitude" in name)
    model.save_pretrained(tmp_path)
    theirs = model.merge_and_unload().state_dict()
    changes = read(tmp_path / "adapter_model.safetensors", base)
    assert {name.rpartition(".")[0] for name in changes} == set(MODULES)
    for name, change in changes.items():
        before = base.state_dict()[name].numpy()
        assert_change(before + checked(name, change, before), theirs[name].numpy(), before)


@pytest.mark.parametrize("on_input", [False, True])
def test_ia3_is_that_of_peft_but_for_one(on_input, tmp_path):
    """LyCORIS keeps the vector less 1."""
    base, names = net(), ["conv_in", "linear_1"]
    config = peft.IA3Config(target_modules=names, feedforward_modules=names if on_input else [])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    tensors = {}
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data = 1 + 0.3 * random(*parameter.shape)
            module = name.removeprefix("base_model.model.").removesuffix(".ia3_l.default")
            vector = parameter.data - 1
            tensors[f"{module}:weight"] = vector.flatten() if vector.ndim == 2 else vector.reshape(1, -1, 1, 1)
            tensors[f"{module}:on_input"] = torch.tensor(int(on_input))
    theirs, ours = model.merge_and_unload(), merged(base, tensors, tmp_path)
    for name in ("conv_in", "time_embedding.linear_1"):
        weights = (module.get_submodule(name).weight.detach() for module in (ours, theirs, base))
        assert_change(*weights)


@pytest.mark.parametrize("since_2024", [True, False])
@pytest.mark.parametrize("name", ["conv_in", "time_embedding.linear_1"])
def test_glora_changes_what_goes_in_and_what_comes_out(name, since_2024, tmp_path):
    """W (x + s a1 a2 x) + s b1 b2 x, layer after layer."""
    base = net()
    out, cin, *window = base.get_submodule(name).weight.shape
    ones = [1 for _ in window]
    a2, a1 = random(3, cin, *ones), random(cin, 3, *ones)
    b2, b1 = 0.3 * random(3, cin, *window), 0.3 * random(out, 3, *ones)
    numbered = {"a1": a1, "a2": a2, "b1": b1, "b2": b2} if since_2024 else {"a1": a2, "a2": a1, "b1": b2, "b2": b1}
    tensors = {f"{name}:{part}.weight": tensor for part, tensor in numbered.items()}
    ours = merged(base, tensors | {f"{name}:alpha": torch.tensor(1.5)}, tmp_path)
    before, x = applied(base, name)
    op = functional.conv2d if window else functional.linear
    theirs = base.get_submodule(name)(x + 0.5 * op(op(x, a2), a1)) + 0.5 * op(op(x, b2), b1)
    assert_change(applied(ours, name)[0], theirs, before)


def cayley(skew):
    identity = torch.eye(len(skew), dtype=torch.float64)
    return (identity + skew) @ torch.linalg.inv(identity - skew)


@pytest.mark.parametrize("constraint", [0.0, 0.02])
@pytest.mark.parametrize("name", ["conv_in", "time_embedding.linear_1"])
def test_oft_rotates_blocks_of_what_comes_out(name, constraint, tmp_path):
    base, blocks, rescale = net(), 0.5 * random(4, 4, 4), 1 + 0.2 * random(16)
    ones = [1 for _ in base.get_submodule(name).weight.shape[1:]]
    tensors = {"oft_blocks": blocks, "rescale": rescale.reshape(-1, *ones), "alpha": torch.tensor(constraint)}
    ours = merged(base, {f"{name}:{part}": tensor for part, tensor in tensors.items()}, tmp_path)
    skew = (blocks - blocks.mT).double()
    if constraint:
        skew *= constraint * 16 / skew.norm()
    rotation = torch.block_diag(*map(cayley, skew)).T
    weight = base.get_submodule(name).weight.detach()
    theirs = torch.einsum("ij,j...->i...", torch.diag(rescale.double()) @ rotation, weight.double())
    assert_change(ours.get_submodule(name).weight, theirs, weight)


def test_boft_rotates_rows_that_are_far_apart_too(tmp_path):
    """Stage i: rows r and r + 2^i b/2 meet in a block, the first half before the second, in turn."""
    base, blocks = net(), 0.5 * random(3, 4, 4, 4)
    ours = merged(base, {"conv_in:oft_blocks": blocks}, tmp_path)
    weight = base.conv_in.weight.detach()
    theirs = weight.flatten(1).double()
    for i, stage in enumerate((blocks - blocks.mT).double()):
        apart, order = 2 * 2**i, torch.zeros(16, 16, dtype=torch.float64)
        for row in range(16):
            group, within = divmod(row, 2 * apart)
            half, position = divmod(within, apart)
            order[group * 2 * apart + 2 * position + half, row] = 1
        theirs = order.T @ torch.block_diag(*map(cayley, stage)) @ order @ theirs
    assert_change(ours.conv_in.weight.detach().flatten(1), theirs, weight.flatten(1))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", MODULES)
def test_dora_of_lycoris_has_a_norm_for_each_output_or_each_input(name, axis, tmp_path):
    base = net()
    weight = base.get_submodule(name).weight.detach()
    out, cin, *window = weight.shape
    down, up = random(2, cin, *window), random(out, 2, *(1 for _ in window))
    scale = 1 + random(*(size if i == axis else 1 for i, size in enumerate(weight.shape))).abs()
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(0.5), "dora_scale": scale}
    ours = merged(base, {f"{name}:{part}": tensor for part, tensor in tensors.items()}, tmp_path)
    theirs = weight + 0.25 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    others = [i for i in range(weight.ndim) if i != axis]
    theirs = theirs * scale / theirs.square().sum(dim=others, keepdim=True).sqrt()
    assert_change(ours.get_submodule(name).weight.detach(), theirs, weight)


def test_dora_of_a_row_without_a_norm_is_finite(tmp_path):
    base = net()
    base.conv_in.weight.data[0] = 0
    tensors = {"lora_down.weight": random(2, 6, 3, 3), "lora_up.weight": torch.zeros(16, 2, 1, 1)}
    tensors["dora_scale"] = torch.ones(16, 1, 1, 1)
    ours = merged(base, {f"conv_in:{part}": tensor for part, tensor in tensors.items()}, tmp_path)
    assert ours.conv_in.weight.isfinite().all()
    assert (ours.conv_in.weight[0] == 0).all()


def test_dora_of_loha_and_differences_of_all_parameters_in_one_file(tmp_path):
    base, name = net(), "time_embedding.linear_1"
    factors = {f"hada_w{i}_{f}": random(*((16, 2) if f == "a" else (2, 12)), seed=i) for i in (1, 2) for f in "ab"}
    tensors = {f"{name}:{part}": tensor for part, tensor in factors.items()}
    tensors |= {f"{name}:dora_scale": torch.full((16, 1), 2.0), f"{name}:alpha": torch.tensor(1.0)}
    tensors |= {f"{name}:diff_b": random(16), "conv_norm_out:w_norm": random(16), "conv_norm_out:b_norm": random(16)}
    tensors |= {"conv_in:diff": random(16, 6, 3, 3), "conv_out:diff": random(12, 16)}
    ours = dict(merged(base, tensors, tmp_path).named_parameters())
    before = dict(base.named_parameters())
    product = (factors["hada_w1_a"] @ factors["hada_w1_b"]) * (factors["hada_w2_a"] @ factors["hada_w2_b"])
    theirs = before[f"{name}.weight"] + 0.5 * product
    expected = {
        f"{name}.weight": 2 * theirs / theirs.norm(dim=1, keepdim=True),
        f"{name}.bias": before[f"{name}.bias"] + random(16),
        "conv_norm_out.weight": before["conv_norm_out.weight"] + random(16),
        "conv_norm_out.bias": before["conv_norm_out.bias"] + random(16),
        "conv_in.weight": before["conv_in.weight"] + random(16, 6, 3, 3),
        "conv_out.weight": before["conv_out.weight"] + random(12, 16)[:, :, None, None],
    }
    assert {key for key in ours if not torch.equal(ours[key], before[key])} == set(expected)
    for key, value in expected.items():
        assert_change(ours[key], value, before[key])


@pytest.mark.parametrize("alpha", [1e10, float("inf"), 0.0])
def test_alpha_says_nothing_of_matrices_that_are_whole(alpha, tmp_path):
    """LyCORIS with a "full" dimension writes 1e10, in float16 infinity."""
    base, name = net(), "time_embedding.linear_1"
    w1, w2 = random(4, 3), random(4, 4)
    tensors = {f"{name}:lokr_w1": w1, f"{name}:lokr_w2": w2, f"{name}:alpha": torch.tensor([alpha])}
    ours = merged(base, tensors, tmp_path).get_parameter(f"{name}.weight")
    before = base.get_parameter(f"{name}.weight")
    assert_change(ours, before + torch.kron(w1, w2), before)


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"hada_w1_a": (16, 2), "hada_w1_b": (2, 12)}, "incomplete: without hada_w2_a and hada_w2_b: 2 keys"),
        (
            {"hada_w1_a": (16, 2), "hada_w1_b": (2, 12), "hada_w2_a": (2, 16), "hada_w2_b": (2, 12)},
            "of another shape than the weight",
        ),
        ({"lokr_w1": (4, 3)}, "incomplete: without lokr_w2_a and lokr_w2_b"),
        ({"lokr_w2": (4, 3)}, "incomplete: without a matrix lokr_w1"),
        ({"lokr_w1": (5, 3), "lokr_w2": (4, 4)}, "of another shape"),
        ({"lokr_w1": (4, 3), "lokr_w2": (4, 5)}, "of another shape"),
        ({"lokr_w1": (4, 3, 1), "lokr_w2": (4, 4)}, "incomplete: without a matrix lokr_w1"),
        ({"a1.weight": (12, 2), "b1.weight": (16, 2)}, "incomplete: without a2 and b2"),
        ({"on_input": ()}, "incomplete: without weight"),
        ({"on_input": (), "weight": (12,)}, "of another shape"),
        ({"weight": (16,)}, "no keys of a LoRA"),
        ({"oft_blocks": (4, 4, 3)}, "of another shape"),
        ({"oft_blocks": (2, 4, 4)}, "of another shape"),
        ({"oft_blocks": (4, 4, 4, 4)}, "of another shape"),
        ({"oft_blocks": ()}, "of another shape"),
        ({"rescale": (16, 1)}, "incomplete: without oft_blocks"),
        ({"diff": (12, 16)}, "of another shape"),
        ({"diff_b": (12,)}, "of another shape"),
        ({"dora_scale": (16, 1)}, "incomplete: nothing but dora_scale"),
        ({"diff": (16, 12), "dora_scale": (7, 1)}, "of another shape"),
        ({"diff": (16, 12), "w_norm": (16, 12)}, "two changes of one weight"),
        ({"lora_up.bias": (16,)}, "incomplete: without up"),
        ({"lora_down.bias": (2,)}, "no keys of a LoRA"),
        ({"lora_down.weight": (), "lora_up.weight": (16, 1)}, "of another shape"),
    ],
)
def test_parts_that_give_no_change_are_named(parts, message, tmp_path):
    tensors = {f"time_embedding.linear_1:{part}": torch.zeros(shape) for part, shape in parts.items()}
    with pytest.raises(CheckpointError, match=message):
        merged(net(), tensors, tmp_path)


@pytest.mark.parametrize(
    "parts",
    [
        {"lora_down.weight": (2, 1), "lora_up.weight": (16, 2)},
        {"lokr_w1": (4, 1), "lokr_w2": (4, 1)},
        {"a1.weight": (1, 2), "a2.weight": (2, 1), "b1.weight": (16, 2), "b2.weight": (2, 1)},
        {"weight": (16,), "on_input": (1,)},
        {"w_norm": (16,), "dora_scale": (1, 16)},
    ],
)
def test_a_change_of_a_matrix_is_none_of_a_norm(parts, tmp_path):
    tensors = {f"conv_norm_out:{part}": torch.ones(shape) for part, shape in parts.items()}
    with pytest.raises(CheckpointError, match=r"a change of a matrix for a vector|of another shape"):
        merged(net(), tensors, tmp_path)


def test_a_bias_that_the_layer_does_not_have_is_named(tmp_path):
    base = net()
    base.conv_in.bias = None
    with pytest.raises(CheckpointError, match=r"a bias that the layer does not have: 1 keys: lora_unet_conv_in.diff_b"):
        merged(base, {"conv_in:diff_b": torch.zeros(16)}, tmp_path)


@pytest.mark.parametrize(
    "alpha, message", [(float("nan"), "not finite"), ((1.0, 2.0), "an alpha that is not one number")]
)
def test_an_alpha_that_is_no_number_is_named(alpha, message, tmp_path):
    tensors = {"lora_down.weight": torch.ones(2, 12), "lora_up.weight": torch.ones(16, 2), "alpha": torch.tensor(alpha)}
    with pytest.raises(CheckpointError, match=message):
        merged(net(), {f"time_embedding.linear_1:{part}": tensor for part, tensor in tensors.items()}, tmp_path)


def test_a_lora_of_weights_that_peft_changed_is_refused(tmp_path):
    """PiSSA takes the first LoRA away from the weights; PEFT saves it as a LoRA of the published ones when asked to."""
    config = peft.LoraConfig(**LORA | {"init_lora_weights": "pissa", "target_modules": ["linear_1"]})
    peft.get_peft_model(net(), config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"init_lora_weights='pissa'.*path_initial_model_for_weight_conversion"):
        read(tmp_path / "adapter_model.safetensors", net())
