"""sdjax's own API: a request as JSON becomes the picture that the pipeline makes of it."""

import base64
import io
import json
import time

import numpy as np
import pytest
from PIL import Image

from sdjax.pictures import metadata
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.request import FIELDS
from sdjax.runtime import parallel

GOOSE = {"prompt": "goose", "num_inference_steps": 3, "guidance_scale": 3.0, "seed": 7}


@pytest.fixture(scope="module")
def pipe(one_level_folder):
    import jax

    return StableDiffusionPipeline.from_pretrained(one_level_folder, mesh=parallel.data_mesh(jax.devices()[:2]))


def data(image: Image.Image, format: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, format)
    return base64.b64encode(file.getvalue()).decode()


def noise(size=(32, 32)) -> Image.Image:
    return Image.effect_noise(size, 90).convert("RGB")


def opened(served, url) -> Image.Image:
    answer = served.http.get(url)
    assert answer.headers["content-type"] == "image/png"
    return Image.open(io.BytesIO(answer.content))


def check(pipe, made, **request):
    """The picture is what the pipeline makes of the request."""
    expected = pipe(**request).images[0]
    assert np.abs(np.asarray(made, float) - np.asarray(expected, float)).max() <= 1


def test_a_picture_is_what_the_pipeline_makes(served, pipe):
    found = served.drawn(**GOOSE, count=2)
    assert [picture["seed"] for picture in found["pictures"]] == [7, 8]
    assert found["state"] == "done"
    for picture in found["pictures"]:
        image = opened(served, picture["url"])
        check(pipe, image, **{**GOOSE, "seed": picture["seed"]})
    assert picture["rows"] == picture["row"] == 4  # of PLMS


def test_a_picture_to_start_from_is_data(served, pipe):
    image = noise()
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    given = {**GOOSE, "image": data(image), "mask_image": f"data:image/png;base64,{data(mask)}"}
    found = served.drawn(**given)
    check(pipe, opened(served, found["pictures"][0]["url"]), **{**GOOSE, "image": image, "mask_image": mask})
    settings = found["pictures"][0]["settings"]
    assert not {"image", "mask_image"} & settings.keys()
    assert settings["had_image"]
    answer = served.http.post("/requests", json=settings)
    assert answer.json()["detail"].startswith("had_image: the pictures of these settings are missing")
    assert served.drawn(**settings, image=data(image))["state"] == "done"


@pytest.mark.parametrize("given", [{"prompt": "goose <lora:style:0.5>"}, {"loras": {"style": 0.5}}])
def test_a_lora_has_a_name(served, folders, one_level_folder, given):
    found = served.drawn(**{**GOOSE, **given})
    pipe = StableDiffusionPipeline.from_pretrained(one_level_folder)
    pipe.load_lora(folders["loras"] / "style.safetensors", 0.5)
    check(pipe, opened(served, found["pictures"][0]["url"]), **GOOSE)
    settings = found["pictures"][0]["settings"]
    assert settings["loras"] == {"style.safetensors": 0.5}
    assert settings["prompt"] == "goose"
    assert str(folders["loras"]) not in served.http.get(found["pictures"][0]["url"]).content.decode("latin-1")
    assert served.drawn(**settings)["state"] == "done"


def test_a_word_of_the_folder_is_known(served, folders, one_level_folder):
    pipe = StableDiffusionPipeline.from_pretrained(one_level_folder)
    pipe.load_textual_inversion(folders["embeddings"] / "fluffy.safetensors", "fluffy")
    given = {**GOOSE, "prompt": "fluffy goose"}
    check(pipe, opened(served, served.drawn(**given)["pictures"][0]["url"]), **given)


SIZE = {"width": 32, "height": 32}
WRONG = {
    "a seed": ({"seed": str(2**64)}, "seed must be a whole number from 0 to 2^64 - 1"),
    "unknown key": ({"step": 3}, "step: unknown; did you mean"),
    "a name of elsewhere": ({"cfg_scale": 3}, "cfg_scale: unknown; here it is guidance_scale"),
    "no prompt": ({"prompt": None}, "prompt must be text"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps must be a whole number"),
    "too many steps": ({"num_inference_steps": 1000}, "num_inference_steps must be a whole number, from 1 to 150"),
    "count": ({"count": 99}, "count must be a whole number, from 1 to 16"),
    "sampler": ({"scheduler": "euler_a"}, "scheduler: there is no sampler"),
    "a scheduler's config": ({"scheduler": {"_class_name": "DDIMScheduler"}}, "scheduler: there is no sampler"),
    "size": ({"width": 33}, "width"),
    "pixels": ({"width": 512, "height": 512}, "width, height: 262,144 pixels; 16,384 at most"),
    "hires pixels": ({"width": 64, "height": 64, "hires_scale": 4}, "width, height: 65,536 pixels"),
    "pixels around a region": (
        {"image": data(noise((160, 160))), "mask_image": data(noise((160, 160))), "padding_mask_crop": 0, **SIZE},
        "padding_mask_crop: of a picture of 25,600 pixels; 16,384 at most",
    ),
    "texts": (
        {"prompt": f"[{'|'.join(map(str, range(40)))}]" + " goose" * 2000, "num_inference_steps": 40},
        "prompt: its texts have",
    ),
    "parts": ({"prompt": "goose AND " * 600 + "goose"}, "prompt: its texts have"),
    "breaks": ({"prompt": "BREAK " * 3000}, "prompt: its texts have"),
    "a file": ({"image": "/etc/passwd"}, "image must be a picture as base64"),
    "an address": ({"image": "http://127.0.0.1/a.png"}, "image must be a picture as base64"),
    "no picture": ({"image": base64.b64encode(b"GIF89a").decode()}, "image: is no picture"),
    "a file of a LoRA": ({"loras": {"../models/one/unet": 1}}, "loras: there is no LoRA"),
    "a LoRA in a prompt": ({"prompt": "<lora:other:1>"}, "prompt: there is no LoRA 'other'"),
    "a LoRA on the Hub": ({"loras": {"owner/name": 1}}, "loras: there is no LoRA"),
    "a preprocessor of elsewhere": ({"control_preprocessor": "openpose"}, "control_preprocessor must be one of"),
    "no ControlNet": ({"control_image": data(Image.new("RGB", (32, 32)))}, "control_image"),
    "a model": ({"model": "../one"}, "model: there is no model"),
    "nested": ({"image": [[["a"]]]}, "image must be a picture"),
    "a large outpainting": (
        {"image": data(noise()), "outpaint": "999999,9999,0,0", "width": 32, "height": 32},
        "outpaint: to",
    ),
}


@pytest.mark.parametrize("given, said", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line(served, given, said):
    answer = served.http.post("/requests", json={**GOOSE, **given})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(said)
    assert "\n" not in answer.json()["detail"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"prompt": NaN}', b"[" * 100_000, b'{"seed": 1' + b"0" * 5000]
)
def test_what_is_no_json(served, body):
    answer = served.http.post("/requests", content=body)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("body: ")


def test_a_decompression_bomb_is_refused(served):
    bomb = data(Image.new("1", (8000, 8000)))
    answer = served.http.post("/requests", json={**GOOSE, "image": bomb})
    assert answer.status_code == 422
    assert "more than" in answer.json()["detail"]


def events(served, order, **options):
    with served.http.stream("GET", f"/requests/{order}/events", params=options) as stream:
        name = None
        for line in stream.iter_lines():
            kind, _, value = line.partition(": ")
            if kind == "event":
                name = value
            elif kind == "data":
                yield name, json.loads(value)


def test_events_tell_progress_previews_and_pictures(served):
    order = served.http.post("/requests", json={**GOOSE, "num_inference_steps": 60}).json()["id"]
    found = list(events(served, order, previews=1))
    names = [name for name, _ in found]
    assert names[0] == "progress"
    assert names[-1] == "done"
    [picture] = [data for name, data in found if name == "picture"]
    assert picture["settings"]["num_inference_steps"] == 60
    previews = [data for name, data in found if name == "preview"]
    assert previews
    assert previews[0]["image"].startswith("data:image/webp;base64,")
    rows = [data["pictures"][0]["row"] for name, data in found if name == "progress"]
    assert rows == sorted(rows)


def test_a_request_is_cancelled(served):
    order = served.http.post("/requests", json={**GOOSE, "num_inference_steps": 150, "count": 3}).json()["id"]
    assert served.http.delete(f"/requests/{order}").status_code == 204
    found = served.ended(order)
    assert found["state"] == "cancelled"
    assert all(picture["state"] == "cancelled" for picture in found["pictures"])
    assert [name for name, _ in events(served, order)] == ["progress", "done"]


def test_a_full_queue_is_said(served):
    orders, answer = [], None
    for _ in range(8):
        answer = served.http.post("/requests", json={**GOOSE, "num_inference_steps": 150, "count": 4})
        if answer.status_code != 202:
            break
        orders.append(answer.json()["id"])
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    listed = served.http.get("/requests").json()
    assert [order["id"] for order in listed[-len(orders) :]] == orders
    assert listed[-1]["position"] > 0
    for order in orders:
        served.http.delete(f"/requests/{order}")
    assert {served.ended(order)["state"] for order in orders} == {"cancelled"}
    assert served.drawn(**GOOSE)["state"] == "done"


def test_the_gallery_has_pictures_newest_first(served, folders):
    _, second = (served.drawn(**GOOSE, count=1, negative_prompt=text) for text in ("red", "blue"))
    page = served.http.get("/pictures", params={"size": 1}).json()
    assert page["pictures"][0]["url"] == second["pictures"][0]["url"]
    assert page["pictures"][0]["settings"] == second["pictures"][0]["settings"]
    assert page["total"] == len(list(folders["out"].glob("*.png")))
    assert served.http.get("/pictures", params={"size": 1, "page": 1}).json()["pictures"][0]["settings"][
        "negative_prompt"
    ] == ("red")
    (folders["out"] / "secret.txt").write_text("secret")
    for name in ("..%2f..%2fetc%2fpasswd", "secret.txt", "none.png", "%00.png", ".hidden.png"):
        assert served.http.get(f"/pictures/{name}").status_code == 404


@pytest.mark.parametrize("is_form", [False, True])
def test_the_settings_of_a_picture_make_it_again(served, is_form):
    found = served.drawn(**GOOSE, scheduler="euler_ancestral", clip_skip=1)
    file = served.http.get(found["pictures"][0]["url"]).content
    sent = {"files": {"file": ("a.png", file)}} if is_form else {"content": file}
    settings = served.http.post("/settings", **sent).json()
    assert settings == found["pictures"][0]["settings"]
    assert settings["scheduler"] == "euler_ancestral"
    again = served.drawn(**settings)
    assert served.http.get(again["pictures"][0]["url"]).content == file


def test_settings_of_the_web_ui_are_read(served):
    text = "goose\nNegative prompt: red\nSteps: 4, Sampler: Euler a, CFG scale: 3, Seed: 5, Size: 32x32, Model: other"
    file = io.BytesIO()
    info = metadata.PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    noise().save(file, "PNG", pnginfo=info)
    settings = served.http.post("/settings", content=file.getvalue()).json()
    assert settings["scheduler"] == "euler_ancestral"
    assert settings["noise"] == "cuda"
    answer = served.http.post("/settings", content=b"no picture")
    assert answer.status_code == 422
    file = io.BytesIO()
    noise().save(file, "PNG")
    answer = served.http.post("/settings", content=file.getvalue())
    assert answer.json()["detail"] == "picture: carries no settings, neither of sdjax nor of the web UI"


def test_capabilities_describe_every_field(served):
    found = served.http.get("/capabilities").json()
    fields = {field["name"]: field for field in found["fields"]}
    assert list(fields) == list(FIELDS)
    assert fields["num_inference_steps"]["minimum"] == 1
    assert fields["noise"]["choices"] == ["jax", "torch", "cuda"]
    assert (found["model"], found["models"], found["loras"]) == ("one", ["one", "two"], ["style"])
    assert found["embeddings"] == ["fluffy"]
    assert {"name": "euler_ancestral", "web_ui": "Euler a"} in found["samplers"]


def test_a_picture_is_sent_again_where_it_has_changed(served):
    url = served.drawn(**GOOSE)["pictures"][0]["url"]
    first = served.http.get(url)
    again = served.http.get(url, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert served.http.get(url, headers={"If-None-Match": '"other"'}).content == first.content


def test_a_lora_that_is_damaged_is_named_without_its_folder(served, folders):
    (folders["loras"] / "damaged.safetensors").write_bytes(b"damaged")
    try:
        while "damaged" not in served.http.get("/capabilities").json()["loras"]:
            time.sleep(0.1)
        found = served.drawn(**GOOSE, loras={"damaged": 1})
    finally:
        (folders["loras"] / "damaged.safetensors").unlink()
    assert found["state"] == "failed"
    assert "damaged.safetensors" in found["pictures"][0]["error"]
    assert "/" not in found["pictures"][0]["error"]


def test_another_model_is_loaded_by_name(served, folders):
    found = served.drawn(**GOOSE, model="two")
    assert found["pictures"][0]["settings"]["model"] == "two"
    assert found["pictures"][0]["rows"] == 3  # of DDIM
    check(
        StableDiffusionPipeline.from_pretrained(folders["models"] / "two"),
        opened(served, found["pictures"][0]["url"]),
        **GOOSE,
    )
    assert served.http.get("/capabilities").json()["model"] == "one"


def test_the_server_says_how_it_is(served):
    assert served.http.get("/health").json()["status"] == "ok"
    assert served.http.get("/ready").status_code in (200, 503)
    assert 'sdjax_pictures_total{state="done"}' in served.http.get("/metrics").text
    assert "/requests" in served.http.get("/openapi.json").json()["paths"]
