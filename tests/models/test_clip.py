"""sdjax.models.clip against PyTorch transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from oracle import SD1, SD2, OneKey, assert_close, normal, ported, randomised, run, text_encoder
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from sdjax.checkpoints.errors import CheckpointError
from sdjax.components import load_model
from sdjax.models import CLIPTextModel, clip

EOS, SIZE = SD1.text["eos_token_id"], SD1.text["vocab_size"]
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


# two texts: one filled up with the end token, the other with another one
TEXTS = np.random.default_rng(0).integers(1, EOS, (2, 77))
TEXTS[0, 5:], TEXTS[1, 20], TEXTS[1, 21:] = EOS, EOS, 0
PROJECTED = {**SD2.text, "num_hidden_layers": 3, "projection_dim": 20}


def projected(folder, **changes):
    """A tiny CLIPTextModelWithProjection of transformers, and sdjax's model loaded from what it saves."""
    reference = randomised(CLIPTextModelWithProjection(CLIPTextConfig(**PROJECTED | changes)))
    reference.save_pretrained(folder)
    return reference, CLIPTextModel.from_pretrained(folder)


def encode(model, ids, **kw):
    return nnx.jit(lambda model, ids: model.encode(ids, **kw))(model, ids)


@pytest.mark.parametrize("changes", [{}, {"eos_token_id": 2}, {"hidden_act": "quick_gelu"}], ids=str)
def test_pooled_text_with_projection(tmp_path, changes):
    reference, model = projected(tmp_path, **changes)
    output = encode(model, TEXTS)
    expected = reference(torch.from_numpy(TEXTS))
    assert_close(output.pooled, expected.text_embeds)
    assert_close(output.states, expected.last_hidden_state)


@pytest.mark.parametrize("changes", [{}, {"eos_token_id": 2}], ids=str)
def test_pooled_text_without_projection(tmp_path, changes):
    reference = text_encoder(SD1.text | changes)
    reference.save_pretrained(tmp_path)
    output = encode(CLIPTextModel.from_pretrained(tmp_path), TEXTS)
    assert_close(output.pooled, reference(torch.from_numpy(TEXTS)).pooler_output)


@pytest.mark.parametrize("layer", [-1, -2, -3, -4])
def test_states_of_any_layer_as_they_are_or_normalised(tmp_path, layer):
    """The pooled text is that of the last layer whichever is asked for."""
    reference, model = projected(tmp_path)
    expected = reference(torch.from_numpy(TEXTS), output_hidden_states=True)
    norm, states = reference.text_model.final_layer_norm, expected.hidden_states[layer]
    for normalize, wanted in ((False, states), (True, norm(states))):
        output = encode(model, TEXTS, layer=layer, normalize=normalize)
        assert_close(output.states, wanted)
        assert_close(output.pooled, expected.text_embeds)
    assert_close(nnx.jit(lambda model, ids: model(ids, layer=layer))(model, TEXTS), norm(states))


@pytest.mark.parametrize("layer", [0, 1, -5])
def test_a_layer_that_does_not_exist_raises(layer):
    config = clip.CLIPTextConfig(num_hidden_layers=3)
    message = f"layer={layer}: the states of 3 layers are -1 to -4"
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: CLIPTextModel(config, rngs=OneKey())(jnp.zeros((1, 9), int), layer=layer))
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: CLIPTextModel(config, rngs=OneKey()).encode(jnp.zeros((1, 9), int), layer=layer))


@pytest.mark.parametrize("eos", [SIZE - 1, 2])
def test_added_embeddings_are_ids_beyond_the_vocabulary(tmp_path, eos):
    reference, model = projected(tmp_path, eos_token_id=eos)
    added = normal(3, PROJECTED["hidden_size"], seed=5)
    embeddings = reference.text_model.embeddings.token_embedding
    embeddings.weight = torch.nn.Parameter(torch.cat([embeddings.weight, torch.from_numpy(added)]), requires_grad=False)
    ids = TEXTS.copy()
    ids[0, 1:4], ids[1, 18] = range(SIZE, SIZE + 3), SIZE + 2
    expected = reference(torch.from_numpy(ids))
    output = nnx.jit(lambda model, ids, added: model.encode(ids, added_embeddings=added))(model, ids, added)
    assert_close(output.states, expected.last_hidden_state)
    ends = expected.last_hidden_state[range(2), [5, 20]]  # PyTorch takes the largest id where the end token is called 2
    assert_close(output.pooled, reference.text_projection(ends))
    whole = model.with_embeddings(added)
    assert whole.config.vocab_size == SIZE + 3 and model.config.vocab_size == SIZE
    other = nnx.jit(lambda model, ids: model.encode(ids, vocab_size=SIZE))(whole, ids)
    jax.tree.map(np.testing.assert_array_equal, other, output)


@pytest.mark.parametrize("repeated", [True, False], ids=["said twice", "said once"])
def test_the_text_half_of_a_whole_clip(tmp_path, repeated):
    """What transformers' CLIPTextModel takes of it; its config may be an old one, which says all of it twice."""
    text = {**SD1.text, "projection_dim": 20}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=text, vision_config={**vision, "image_size": 32}, projection_dim=20)
    randomised(CLIPModel(config)).save_pretrained(tmp_path)
    if repeated:
        saved = json.loads((tmp_path / "config.json").read_text())
        saved["text_config_dict"] = {"hidden_size": SD1.text["hidden_size"], "hidden_act": "gelu"}
        (tmp_path / "config.json").write_text(json.dumps(saved))
    model, reference = CLIPTextModel.from_pretrained(tmp_path), transformers.CLIPTextModel.from_pretrained(tmp_path)
    reference.requires_grad_(False)
    assert model.config.projection_dim is None
    expected = reference(torch.from_numpy(TEXTS))
    output = encode(model, TEXTS)
    assert_close(output.states, expected.last_hidden_state)
    assert_close(output.pooled, expected.pooler_output)
    reference = CLIPTextModelWithProjection.from_pretrained(tmp_path).requires_grad_(False)
    second = load_model("text_encoder_2", tmp_path, dtype=None)
    assert_close(encode(second, TEXTS).pooled, reference(torch.from_numpy(TEXTS)).text_embeds)
    second.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == [type(reference).__name__]


def test_added_embeddings_change_no_other_text(tmp_path):
    _, model = projected(tmp_path)
    added = normal(3, PROJECTED["hidden_size"], seed=5)
    jax.tree.map(np.testing.assert_array_equal, encode(model, TEXTS, added_embeddings=added), encode(model, TEXTS))


def test_transformers_reads_what_is_saved(tmp_path):
    reference, model = projected(tmp_path / "theirs", eos_token_id=2)
    model.save_pretrained(tmp_path / "ours")
    config = CLIPTextConfig.from_pretrained(tmp_path / "ours")
    assert config.architectures == ["CLIPTextModelWithProjection"]
    loaded = CLIPTextModelWithProjection.from_pretrained(tmp_path / "ours")
    expected = reference(torch.from_numpy(TEXTS)).text_embeds
    torch.testing.assert_close(loaded(torch.from_numpy(TEXTS)).text_embeds, expected, rtol=0, atol=0)


def test_the_projection_is_that_of_the_architecture():
    """Every text encoder's config has a projection_dim; the class says whether there is a projection."""
    fields = {"projection_dim": 512, "architectures": ["CLIPTextModel"]}
    assert clip.CLIPTextConfig.from_dict(fields).projection_dim is None
    assert "projection_dim" not in clip.CLIPTextConfig.from_dict(fields).to_dict()
    with_projection = {"architectures": ["CLIPTextModelWithProjection"]}
    assert clip.CLIPTextConfig.from_dict(with_projection).projection_dim == CLIPTextConfig().projection_dim
