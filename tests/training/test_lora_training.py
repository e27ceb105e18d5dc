"""LoRA as it is trained, against PyTorch diffusers with PEFT."""

import json
from functools import partial

import jax
import numpy as np
import optax
import oracle
import pytest
import torch_training
from comparing import check_steps, our_picture, set_values, their_picture
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, PeftModel, inject_adapter_in_model

import sdjax
from sdjax.checkpoints import lora as lora_file
from sdjax.checkpoints import weights
from sdjax.checkpoints.folder import torch_layout, variables
from sdjax.checkpoints.variables import get_value
from sdjax.training import lora
from sdjax.training.lora import Lora
from sdjax.training.objective import Objective
from sdjax.training.trainer import Trainer

RANK, ALPHA = 2, 3.0


def begin(folder, **options):
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(folder)
    given = Lora(rank=RANK, alpha=ALPHA, text_encoder_targets=lora.TEXT_ENCODER, **options)
    trained = lora.begin(pipe, given, jax.random.key(0))
    rng = np.random.default_rng(0)
    for own in trained.initial.values():  # else up is 0, and nothing of down counts
        for name, value in own.items():
            if name.endswith("up.weight"):
                own[name] = 0.1 * rng.standard_normal(value.shape, dtype=np.float32)
    return pipe, trained


def their_parameters(pipe, trained, **config):
    """PEFT's, with the values of ours: {(component, our name): parameter}."""
    found = {}
    for component, own in trained.initial.items():
        model, paths = getattr(pipe, component), dict.fromkeys(name.partition(".lora.")[0] for name in own)
        targets = [path.removeprefix("text_model.") for path in paths]
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **config), model)
        theirs = {f".{name}".replace(".text_model", ""): value for name, value in model.named_parameters()}
        for name in own:
            path, _, part = name.partition(".lora.")
            kinds = {"down.weight": "lora_A.default.weight", "up.weight": "lora_B.default.weight"}
            kinds["magnitude"] = "lora_magnitude_vector.default.weight"
            found[component, name] = theirs[f".{path.removeprefix('text_model.')}.{kinds[part]}"]
    set_values(found, trained.initial)
    return found


LOCON = {"conv_rank": RANK, "conv_alpha": ALPHA}


@pytest.mark.parametrize(
    ("family", "options"), [("SD1", LOCON), ("XL_ONE_LEVEL", {}), ("ATTENDING", {**LOCON, "use_dora": True})]
)
def test_steps_are_those_of_pytorch(family, options, tmp_path):
    reference = oracle.pipeline(tmp_path, getattr(oracle, family))
    reference.save_pretrained(tmp_path / "model")
    pipe, trained = begin(tmp_path / "model", **options)
    batch, draws = torch_training.batch(reference), torch_training.draws()
    parameters = their_parameters(reference, trained, use_dora="use_dora" in options)
    their_loss = partial(torch_training.loss, reference, batch, draws, snr_gamma=5.0)
    check_steps(trained, Objective.of(pipe.scheduler, snr_gamma=5.0), batch, draws, parameters, their_loss)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A pipeline, and a LoRA of all kinds of its layers, whose ranks and alphas are not the same."""
    folder = oracle.save_pipeline(tmp_path_factory.mktemp("lora"), oracle.SD1)
    pipe, trained = begin(folder, targets=(*lora.UNET, "proj_in"), conv_rank=3, conv_alpha=1.5)
    plain = our_picture(pipe)
    trained.install(trained.initial)
    picture = our_picture(pipe)
    pipe.unload_loras()
    assert np.abs(picture - plain).max() > 0.02
    return folder, trained, picture


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_pytorch_draws_the_same_picture(format, everything, tmp_path):
    folder, trained, picture = everything
    path = tmp_path / ("" if format == "peft" else lora_file.FILE_NAMES[0])
    trained.save(path, trained.initial, format=format)
    theirs, ours = oracle.opened(folder, StableDiffusionPipeline), sdjax.StableDiffusionPipeline.from_pretrained(folder)
    if format == "peft":
        for component in trained.initial:
            setattr(theirs, component, PeftModel.from_pretrained(getattr(theirs, component), path / component))
            ours.load_lora(path / component)
    else:
        theirs.load_lora_weights(tmp_path)
        ours.load_lora(path)
    oracle.assert_close(our_picture(ours), picture, 1e-6)
    oracle.assert_close(picture, their_picture(theirs), 1e-4)


@pytest.mark.parametrize(("format", "use_dora"), [("kohya", False), ("kohya", True), ("diffusers", True)])
def test_pytorch_merges_the_same_weights(format, use_dora, tmp_path):
    """Of SDXL, whose text encoders are two; what is installed replaces what was installed."""
    folder = oracle.save_pipeline(tmp_path, oracle.XL_ONE_LEVEL)
    pipe, trained = begin(folder, conv_rank=3, use_dora=use_dora)
    trained.install(jax.tree.map(lambda value: 2 * value, trained.initial))
    trained.install(trained.initial)
    trained.save(tmp_path / lora_file.FILE_NAMES[0], trained.initial, format=format)
    ours = sdjax.StableDiffusionPipeline.from_pretrained(folder)
    ours.load_lora(tmp_path)
    theirs = oracle.opened(folder, StableDiffusionXLPipeline)
    theirs.load_lora_weights(tmp_path)
    theirs.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    theirs.unload_lora_weights()
    for component in trained.initial:
        reference, again = getattr(theirs, component).state_dict(), variables(getattr(ours, component))
        for name, variable in variables(getattr(pipe, component)).items():
            own = reference.get(name, reference.get(name.removeprefix("text_model.")))
            oracle.assert_close(get_value(again[name]), get_value(variable), 1e-6)
            if not (format == "kohya" and use_dora):  # of whose magnitudes diffusers says that it leaves them out
                oracle.assert_close(torch_layout(name, get_value(variable)), own.numpy(), 1e-5)


def test_bfloat16_is_close_to_float32(one_level_folder, tmp_path):
    """Of networks in bfloat16 the loss, and the direction of the gradient of float32 factors."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        pipe = sdjax.StableDiffusionPipeline.from_pretrained(one_level_folder, dtype=dtype)
        options = {"texts_cached": True, "gradient_checkpointing": True}
        trained = lora.begin(pipe, Lora(targets=(), conv_rank=4, use_dora=True), jax.random.key(0), **options)
        moments, text = oracle.normal(2, 8, 8, 8), {"hidden": oracle.normal(2, 7, 24)}
        trainer = Trainer(trained, Objective.of(pipe.scheduler), optax.sgd(1.0))
        state, metrics = trainer(trainer.state(), {"moments": moments, "text": text}, torch_training.draws())
        assert {value.dtype.name for value in state.params["unet"].values()} == {"float32"}
        changes = jax.tree.map(lambda new, old: np.asarray(new - old).ravel(), state.params, trained.initial)
        found[dtype] = metrics["loss"], np.concatenate(jax.tree.leaves(changes))
    (loss, gradient), (low_loss, low_gradient) = found.values()
    np.testing.assert_allclose(low_loss, loss, rtol=0.02)
    cosine = gradient @ low_gradient / np.linalg.norm(gradient) / np.linalg.norm(low_gradient)
    assert cosine > 0.99


def test_float16_is_refused(one_level_folder):
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(one_level_folder, dtype="float16")
    with pytest.raises(ValueError, match=r"float16: .* bfloat16"):
        lora.begin(pipe, Lora(), jax.random.key(0))


def test_the_header_is_that_of_kohya(everything, tmp_path):
    _, trained, _ = everything
    trained.save(tmp_path / "a.safetensors", trained.initial, metadata={"ss_steps": 7, "ss_output_name": "a"})
    header = weights.read_metadata(tmp_path / "a.safetensors")
    assert header.items() >= {"ss_network_dim": "2", "ss_network_alpha": "3.0", "ss_steps": "7"}.items()
    assert header["ss_network_module"] == "networks.lora"
    assert json.loads(header["ss_network_args"]) == {"conv_dim": 3, "conv_alpha": 1.5}
    with pytest.raises(ValueError, match="format='ckpt': one of kohya, diffusers, peft"):
        trained.save(tmp_path / "a.safetensors", trained.initial, format="ckpt")


def test_targets_that_no_layer_has_are_named(sd1_folder):
    pipe = sdjax.StableDiffusionPipeline.from_pretrained(sd1_folder)
    with pytest.raises(ValueError, match="no layer of the unet is called to_x"):
        lora.begin(pipe, Lora(targets=["to_x"]), jax.random.key(0))
    with pytest.raises(ValueError, match="text encoders are trained"):
        lora.begin(pipe, Lora(text_encoder_targets=["q_proj"]), jax.random.key(0), texts_cached=True)
    with pytest.raises(ValueError, match="no layers to train"):
        lora.begin(pipe, Lora(targets=[]), jax.random.key(0))
