"""The web UI's API, asked by clients of it that know nothing of sdjax."""

import base64
import functools
import io
import json
import threading
import time

import numpy as np
import pytest
import webuiapi
from PIL import Image

from sdjax import sampling
from sdjax.pictures.web_ui import SAMPLERS
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.sampling import NAMES
from sdjax.serve.web_ui_bodies import filled

GOOSE = {
    "prompt": "goose",
    "negative_prompt": "red",
    "seed": 7,
    "steps": 3,
    "cfg_scale": 3.0,
    "width": 32,
    "height": 32,
}


@pytest.fixture(scope="module")
def client(served):
    return webuiapi.WebUIApi(host="127.0.0.1", port=served.port, sampler="Euler", steps=3)


def noise(size=(32, 32)):
    return Image.effect_noise(size, 90).convert("RGB")


def close(one, other):
    return np.abs(np.asarray(one, float) - np.asarray(other, float)).max() <= 1


def native(served, **request):
    """The picture of the same request to sdjax's own API."""
    known = {"prompt": "goose", "negative_prompt": "red", "seed": 7, "num_inference_steps": 3, "guidance_scale": 3.0}
    found = served.drawn(**{**known, "width": 32, "height": 32, "scheduler": "euler", **request})
    assert found["state"] == "done", found
    return image_of(served, found)


def image_of(served, found):
    return Image.open(io.BytesIO(served.http.get(found["pictures"][0]["url"]).content))


def test_text_to_image(served, client):
    made = client.txt2img(**GOOSE, batch_size=2)
    assert len(made.images) == 2
    assert close(made.image, native(served))
    assert close(made.images[1], native(served, seed=8))
    assert made.info["all_seeds"] == [7, 8]
    assert made.info["sampler_name"] == "Euler"
    assert made.info["infotexts"][0].startswith("goose\nNegative prompt: red\nSteps: 3, Sampler: Euler")
    assert made.info["sd_model_name"] == "one"
    assert made.parameters["prompt"] == "goose"


@pytest.mark.parametrize(
    "sampler, scheduler, ours", [("Euler a", None, "euler_ancestral"), ("DPM++ 2M", "karras", None)]
)
def test_samplers_have_the_names_of_the_web_ui(served, client, sampler, scheduler, ours):
    made = client.txt2img(**GOOSE, sampler_name=sampler, scheduler=scheduler)
    assert close(made.image, native(served, scheduler=ours or "dpmpp_2m_karras"))


def test_eta_of_ddim_is_as_it_comes(served, client, one_level_folder):
    """1 by default of this client; then a row draws noise."""
    made = client.txt2img(**GOOSE, sampler_name="DDIM")
    pipe = StableDiffusionPipeline.from_pretrained(one_level_folder)
    pipe.scheduler = sampling.from_config(pipe.scheduler.config, sampler="ddim", eta=1.0)
    assert close(made.image, made_by(pipe))
    usual = client.txt2img(**GOOSE, sampler_name="DDIM", eta=0)
    assert close(usual.image, native(served, scheduler="ddim"))
    assert not close(usual.image, made.image)
    assert close(native(served, scheduler="ddim", eta=1), made.image)
    settings = served.http.get("/pictures", params={"size": 1}).json()["pictures"][0]["settings"]
    assert settings["eta"] == 1
    assert close(image_of(served, served.drawn(**settings)), made.image)


def test_image_to_image_runs_as_many_steps(served, client):
    """int(0.5 * 3) + 1 of them, 2."""
    image = noise()
    made = client.img2img(images=[image], **GOOSE, denoising_strength=0.5)
    assert close(made.image, native(served, image=webuiapi.b64_img(image), strength=0.7))


def test_a_mask_is_white_where_the_picture_is_made_anew(served, client):
    image, mask = noise(), Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    given = {**GOOSE, "images": [image], "inpainting_fill": 1, "inpaint_full_res": False, "mask_blur": 0}
    made = client.img2img(**given, mask_image=mask, denoising_strength=0.5)
    assert close(np.asarray(made.image)[:, 16:], np.asarray(image)[:, 16:])
    assert not close(made.image, image)
    mirrored = Image.fromarray(255 - np.asarray(mask))
    again = client.img2img(**given, mask_image=mirrored, inpainting_mask_invert=1, denoising_strength=0.5)
    assert close(made.image, again.image)
    usual = client.img2img(**{**given, "inpainting_fill": 0}, mask_image=mask, denoising_strength=0.5)
    assert close(np.asarray(usual.image)[:, 16:], np.asarray(image)[:, 16:])
    assert not close(usual.image, made.image)


def test_what_is_masked_is_filled_with_colours_around():
    image, mask = Image.new("RGB", (64, 64), (200, 30, 30)), Image.new("L", (64, 64))
    image.paste((0, 255, 0), (16, 16, 48, 48))
    mask.paste(255, (16, 16, 48, 48))
    assert np.abs(np.asarray(filled(image, mask), float) - (200, 30, 30)).max() <= 8


def test_hires(served, client):
    made = client.txt2img(**GOOSE, enable_hr=True, hr_scale=2, hr_upscaler="Latent", denoising_strength=0.5)
    assert made.image.size == (64, 64)
    assert close(made.image, native(served, hires_scale=2, hires_strength=0.7))


def test_hires_by_an_esrgan_of_the_folder(served, client):
    made = client.txt2img(**GOOSE, enable_hr=True, hr_scale=2, hr_upscaler="sharp", denoising_strength=0.5)
    hires = {"hires_scale": 2, "hires_strength": 0.7, "hires_upscaler": "model"}
    assert close(made.image, native(served, **hires, upscaler="sharp"))
    assert not close(made.image, native(served, **hires | {"hires_upscaler": "lanczos"}))


@pytest.fixture(scope="module")
def controlled(folders, one_level_folder):
    """Pipelines with ControlNets of the folder, by their names."""

    def pipe(*names):
        paths = [folders["models"] / "ControlNet" / name for name in names]
        return StableDiffusionPipeline.from_pretrained(one_level_folder, controlnet=paths, scheduler="euler")

    return functools.cache(pipe)


def controlled_by(call, units, **given):
    return call(**GOOSE, **given, alwayson_scripts={}, controlnet_units=units)  # its own default remembers units


def made_by(pipe, **request):
    known = {"prompt": "goose", "negative_prompt": "red", "seed": 7, "num_inference_steps": 3, "guidance_scale": 3.0}
    return pipe(**{**known, "width": 32, "height": 32, **request}).images[0]


def test_units_of_controlnet(served, client, controlled):
    """One, two, one that is not enabled; weights, parts of the steps, preprocessors; other requests without."""
    shown, other = noise(), noise()
    first = webuiapi.ControlNetUnit(image=shown, model="edges", weight=0.8, guidance_end=0.7)
    second = webuiapi.ControlNetUnit(image=other, model="depth [d14c016b]", module="lineart", guidance_start=0.2)
    off = webuiapi.ControlNetUnit(image=other, model="depth", enabled=False)
    made = controlled_by(client.txt2img, [first, off])
    shares = {"controlnet_conditioning_scale": 0.8, "control_guidance_end": 0.7}
    assert close(made.image, made_by(controlled("edges"), control_image=shown, **shares))
    assert not close(made.image, native(served))
    both = controlled_by(client.txt2img, [first, second])
    shares = {"controlnet_conditioning_scale": [0.8, 1.0], "control_guidance_end": [0.7, 1.0]}
    shares |= {"control_guidance_start": [0.0, 0.2], "control_preprocessor": ["none", "lineart"]}
    assert close(both.image, made_by(controlled("edges", "depth"), control_image=[shown, other], **shares))
    assert close(controlled_by(client.txt2img, [off]).image, native(served))


def test_a_unit_without_a_picture_sees_that_of_image_to_image(client, controlled):
    image = noise()
    unit = webuiapi.ControlNetUnit(model="edges")
    made = controlled_by(client.img2img, [unit], images=[image], denoising_strength=0.5)
    assert close(made.image, made_by(controlled("edges"), image=image, control_image=image, strength=0.7))
    with pytest.raises(RuntimeError, match="controlnet 0: image: is missing"):
        controlled_by(client.txt2img, [unit])


def test_a_unit_beside_a_mask(client, controlled):
    image, mask = noise((64, 64)), Image.new("L", (64, 64))
    mask.paste(255, (8, 8, 40, 40))
    unit = webuiapi.ControlNetUnit(image=image, model="edges")
    given = {"images": [image], "mask_image": mask, "inpainting_fill": 1, "mask_blur": 0}
    made = controlled_by(client.img2img, [unit], **given, inpaint_full_res=True, denoising_strength=0.5)
    inpainted = {"image": image, "mask_image": mask, "strength": 0.7, "padding_mask_crop": 0}
    assert close(made.image, made_by(controlled("edges"), control_image=image, **inpainted))


@pytest.mark.parametrize("mode, box", [("Just Resize", None), ("Crop and Resize", (8, 0, 40, 32)), (2, (0, 8, 32, 24))])
def test_the_shapes_of_control_pictures(client, controlled, mode, box):
    shown = noise((48, 32)) if mode != 2 else Image.new("RGB", (64, 32), (200, 30, 30))
    unit = webuiapi.ControlNetUnit(image=shown, model="edges", resize_mode=mode)
    made = controlled_by(client.txt2img, [unit])
    expected = (
        shown if mode == "Just Resize" else shown.crop(box) if mode != 2 else Image.new("RGB", (32, 32), (200, 30, 30))
    )
    assert close(made.image, made_by(controlled("edges"), control_image=expected))


@pytest.mark.parametrize(
    "given, said",
    [
        ({"model": "other"}, "controlnet 0: model: there is no ControlNet"),
        ({"model": "None"}, "controlnet 0: model: must be one of /controlnet/model_list"),
        ({"model": "../one"}, "controlnet 0: model: there is no ControlNet"),
        ({"model": "wide"}, "controlnet: the block_out_channels of controlnet"),
        ({"module": "openpose_full"}, "controlnet 0: module must be one of"),
        ({"weight": "much"}, "controlnet 0: weight must be a finite number"),
        ({"guidance_start": 0.9, "guidance_end": 0.1}, "control_guidance_start, 0.9, must be below"),
        ({"control_mode": 2}, "controlnet 0: control_mode: "),
        ({"mask": Image.new("L", (8, 8))}, "controlnet 0: mask: "),
    ],
)
def test_what_is_wrong_with_a_unit(client, given, said):
    unit = webuiapi.ControlNetUnit(**{"image": noise(), "model": "edges", **given})
    with pytest.raises(RuntimeError) as error:
        controlled_by(client.txt2img, [unit])
    assert said in str(error.value)


def test_lists_of_controlnet(client):
    assert client.controlnet_version() == 3
    assert client.controlnet_model_list() == ["depth", "edges", "wide"]
    assert client.controlnet_module_list() == ["none", "inpaint", "canny", "lineart", "blur", "tile"]


def test_a_network_is_named_in_the_settings(served, folders):
    given = {"control_image": webuiapi.b64_img(noise()), "controlnet": ["edges"], "width": 32, "height": 32}
    found = served.drawn(prompt="goose", num_inference_steps=2, **given)
    assert found["pictures"][0]["settings"]["controlnet"] == ["edges"]
    file = served.http.get(found["pictures"][0]["url"]).content
    assert str(folders["models"]) not in file.decode("latin-1")


UNSUPPORTED = {
    "tiling": True,
    "restore_faces": True,
    "subseed_strength": 0.5,
    "styles": ["anime"],
    "script_name": "x/y/z plot",
    "alwayson_scripts": {"ADetailer": {"args": [True]}},
    "refiner_checkpoint": "two",
    "sampler_name": "Restart",
    "scheduler": "sgm_uniform",
    "eta": 0.5,
    "override_settings": {"sd_vae": "other.safetensors"},
    "s_churn": 0.3,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_an_error(served, name):
    given = {**GOOSE, "sampler_name": "Euler a", name: UNSUPPORTED[name]}
    answer = served.http.post("/sdapi/v1/txt2img", json=given)
    assert answer.status_code == 422
    assert "support" in answer.json()["detail"] or "counterpart" in answer.json()["detail"]


@pytest.mark.parametrize("name", ["resize_mode", "inpainting_fill"])
def test_what_is_not_supported_of_image_to_image(served, client, name):
    given = {**GOOSE, "images": [noise()], "mask_image": Image.new("L", (32, 32), 255), name: 2}
    with pytest.raises(RuntimeError, match="not supported"):
        client.img2img(**given)


def test_errors_name_the_field_of_the_web_ui(served):
    for name, value in {"steps": 0, "cfg_scale": "a", "batch_size": 99, "denoising_strength": 2, "width": "a"}.items():
        answer = served.http.post("/sdapi/v1/txt2img", json={**GOOSE, "enable_hr": True, name: value})
        assert answer.status_code == 422
        assert name in answer.json()["detail"]


def test_init_images_are_data_alone(served):
    for value in ("/etc/passwd", "http://127.0.0.1/picture.png", "file:///etc/passwd"):
        answer = served.http.post("/sdapi/v1/img2img", json={**GOOSE, "init_images": [value]})
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith("init_images must be a picture")


def test_lists(client, served):
    assert client.util_get_model_names() == ["one", "two"]
    assert set(client.util_get_sampler_names()) == set(SAMPLERS.values())
    assert "karras" in client.util_get_scheduler_names()
    assert [lora["name"] for lora in client.get_loras()] == ["style"]
    assert list(client.get_embeddings()["loaded"]) == ["fluffy"]
    assert [one["name"] for one in client.get_upscalers()] == ["None", "Lanczos", "Nearest", "sharp"]
    assert client.get_latent_upscale_modes()
    assert "ram" in client.get_memory()
    assert client.get_sd_vae() == client.get_prompt_styles() == client.get_hypernetworks() == []
    assert client.get_cmd_flags() == {}
    assert set(SAMPLERS) <= {*NAMES}


def test_options_change_the_model_and_unknown_keys_pass(client):
    options = client.get_options()
    assert options["sd_model_checkpoint"] == client.util_get_current_model() == "one"
    client.set_options({**options, "of_an_extension": [1, 2], "sd_model_checkpoint": "two"})
    assert client.get_options()["sd_model_checkpoint"] == "two"
    assert client.txt2img(**GOOSE).info["sd_model_name"] == "two"
    client.util_set_model("one")
    assert client.txt2img(**GOOSE).info["sd_model_name"] == "one"


def test_override_settings(served, client):
    given = {"CLIP_stop_at_last_layers": 2, "randn_source": "CPU", "of_an_extension": 1}
    made = client.txt2img(**GOOSE, override_settings=given)
    assert close(made.image, native(served, clip_skip=1, noise="torch"))
    assert made.info["clip_skip"] == 2


def test_progress_and_interrupt(client):
    assert client.get_progress()["state"]["job_count"] == 0
    made = {}
    thread = threading.Thread(
        target=lambda: made.update(result=client.txt2img(**{**GOOSE, "steps": 150}, batch_size=4))
    )
    thread.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = client.get_progress()
        if found["current_image"]:
            break
        time.sleep(0.02)
    assert 0 < found["progress"] < 1
    assert found["state"]["job_count"] == 4
    assert found["state"]["sampling_steps"] == 150
    assert Image.open(io.BytesIO(base64.b64decode(found["current_image"]))).size == (32, 32)
    client.interrupt()
    thread.join(60)
    assert len(made["result"].images) < 4
    client.util_wait_for_ready(0.05)


def test_png_info_and_extras(client):
    made = client.txt2img(**GOOSE)
    found = client.png_info(made.image)
    assert found.info == "" or found.info.startswith("goose")
    larger = client.extra_single_image(made.image, upscaler_1="Lanczos", upscaling_resize=1.5)
    assert larger.image.size == (48, 48)
    cropped = client.extra_single_image(made.image, resize_mode=1, upscaling_resize_w=40, upscaling_resize_h=20)
    assert cropped.image.size == (40, 20)
    with pytest.raises(RuntimeError, match="not supported"):
        client.extra_single_image(made.image, upscaler_1="LDSR")


@pytest.mark.parametrize("scale, passes", [(4, 1), (2, 1), (8, 2)])
def test_an_esrgan_of_the_folder_makes_larger(client, scale, passes):
    """As many passes as it takes, 4 times each, then Lanczos."""
    import test_rrdbnet
    import torch

    image = Image.effect_noise((64, 64), 90).convert("RGB")
    expected = image
    for _ in range(passes):
        pixels = torch.from_numpy(np.asarray(expected, np.float32) / 255).permute(2, 0, 1)[None]
        made = test_rrdbnet.reference(test_rrdbnet.tensors(4), pixels, 4)[0].permute(1, 2, 0).clamp(0, 1).numpy()
        expected = Image.fromarray(np.uint8(np.rint(made * 255)))
    found = client.extra_single_image(image, upscaler_1="sharp", upscaling_resize=scale).image
    assert close(found, expected.resize((64 * scale, 64 * scale), Image.Resampling.LANCZOS))


def test_what_an_esrgan_may_make(client):
    image = Image.new("RGB", (1500, 1500))
    with pytest.raises(RuntimeError, match="36,000,000 pixels, 4 times as large; 33,554,432 at most"):
        client.extra_single_image(image, upscaler_1="sharp", upscaling_resize=2)


def test_png_info_of_a_file(served):
    made = served.http.post("/sdapi/v1/txt2img", json=GOOSE).json()
    found = served.http.post("/sdapi/v1/png-info", json={"image": "data:image/png;base64," + made["images"][0]}).json()
    assert found["info"] == json.loads(made["info"])["infotexts"][0]
    assert found["parameters"]["seed"] == 7


def test_as_open_webui_asks(served):
    """It reads all options, posts them back with the model, then asks with few fields."""
    headers = {"Authorization": "Basic Og=="}
    options = served.http.get("/sdapi/v1/options", headers=headers).json()
    models = served.http.get("/sdapi/v1/sd-models", headers=headers).json()
    options["sd_model_checkpoint"] = models[0]["title"]
    assert served.http.post("/sdapi/v1/options", json=options, headers=headers).status_code == 200
    given = {"prompt": "goose", "batch_size": 1, "width": 32, "height": 32, "steps": 3, "cfg_scale": 7.0}
    given |= {"negative_prompt": "red", "sampler_name": "DPM++ 2M", "scheduler": "Karras"}
    made = served.http.post("/sdapi/v1/txt2img", json=given, headers=headers).json()
    assert Image.open(io.BytesIO(base64.b64decode(made["images"][0]))).size == (32, 32)


def test_as_sillytavern_asks(served):
    assert served.http.get("/sdapi/v1/options").status_code == 200
    for path in ("samplers", "schedulers", "sd-models", "upscalers", "latent-upscale-modes", "sd-vae"):
        assert isinstance(served.http.get(f"/sdapi/v1/{path}").json(), list)
    given = {
        **{name: GOOSE[name] for name in ("prompt", "negative_prompt", "steps", "cfg_scale", "width", "height")},
        "sampler_name": "Euler a",
        "scheduler": "Automatic",
        "restore_faces": False,
        "enable_hr": False,
        "hr_upscaler": "Latent",
        "hr_scale": 1,
        "denoising_strength": 0.7,
        "hr_second_pass_steps": 0,
        "override_settings": {"CLIP_stop_at_last_layers": 1},
        "override_settings_restore_afterwards": True,
        "clip_skip": 1,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
    }
    made = served.http.post("/sdapi/v1/txt2img", json=given)
    assert made.status_code == 200, made.text
    found = served.http.get("/sdapi/v1/progress").json()
    assert found["progress"] == 0
    assert found["state"]["job_count"] == 0
