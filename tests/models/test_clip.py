"""sdjax.models.clip against PyTorch transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracle import SD1, SD2, assert_close, normal, ported, randomised, run, text_encoder
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from sdjax.checkpoints.errors import CheckpointError
from sdjax.models import CLIPTextModel, clip
from sdjax.models.base import OneKey

IDS = np.random.default_rng(0).integers(0, SD1.text["vocab_size"], (2, 77))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_layer(act):
    fields = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "hidden_act": act}
    config = CLIPTextConfig(**fields, attn_implementation="eager")
    reference = randomised(CLIPEncoderLayer(config))
    block = ported(lambda **kw: clip.EncoderLayer(clip.CLIPTextConfig(**fields), **kw), reference)
    x = 2 * normal(2, 6, 16)
    causal = torch.full((6, 6), -torch.inf).triu(1)[None, None]
    assert_close(run(block, x), reference(torch.from_numpy(x), causal))


@pytest.mark.parametrize("family", [SD1, SD2], ids=["quick_gelu", "gelu"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_states_of_the_last_and_the_penultimate_layer(tmp_path, family, layer):
    reference = text_encoder(family.text)
    reference.save_pretrained(tmp_path)
    model = CLIPTextModel.from_pretrained(tmp_path)
    expected = reference(torch.from_numpy(IDS), output_hidden_states=True)
    states = expected.last_hidden_state if layer == -1 else reference.final_layer_norm(expected.hidden_states[layer])
    assert_close(nnx.jit(lambda model, ids: model(ids, layer=layer))(model, IDS), states)


def test_fewer_tokens_than_positions(tmp_path):
    reference = text_encoder(SD1.text)
    reference.save_pretrained(tmp_path)
    ids = IDS[:, :5]
    assert_close(run(CLIPTextModel.from_pretrained(tmp_path), ids), reference(torch.from_numpy(ids)).last_hidden_state)


def test_more_tokens_than_positions_raise():
    config = clip.CLIPTextConfig(max_position_embeddings=8)
    with pytest.raises(ValueError, match="9 tokens, but 8 positions"):
        nnx.eval_shape(lambda: CLIPTextModel(config, rngs=OneKey())(jnp.zeros((1, 9), int)))


def test_an_unknown_activation_is_named():
    with pytest.raises(CheckpointError, match="hidden_act='gelu_new'"):
        CLIPTextModel.from_config(SD1.text | {"hidden_act": "gelu_new"})


def test_names_with_and_without_prefix_load_alike(tmp_path):
    """transformers 5 saves without `text_model.`; every published checkpoint has it, and a position_ids buffer."""
    text_encoder(SD1.text).save_pretrained(tmp_path / "new")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    assert not any(name.startswith("text_model.") for name in tensors)
    old = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "new" / "config.json").read_bytes())
    a, b = (nnx.to_pure_dict(nnx.state(CLIPTextModel.from_pretrained(tmp_path / name))) for name in ("new", "old"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
