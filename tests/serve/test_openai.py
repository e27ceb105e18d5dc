"""OpenAI's API, asked by its own client."""

import base64
import io

import numpy as np
import openai
import pytest
from PIL import Image

from sdjax.pictures import metadata

OWN = {"num_inference_steps": 3, "guidance_scale": 3.0, "seed": 7, "negative_prompt": "red"}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client.images


def image_of(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def close(one, other):
    return np.abs(np.asarray(one, float) - np.asarray(other, float)).max() <= 1


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return "a.png", file.getvalue(), "image/png"


def native(served, **request):
    found = served.drawn(prompt="goose", **OWN, **request)
    assert found["state"] == "done", found
    return Image.open(io.BytesIO(served.http.get(found["pictures"][0]["url"]).content))


def test_generations(served, client):
    made = client.generate(prompt="goose", n=2, size="32x32", extra_body=OWN)
    assert len(made.data) == 2
    assert close(image_of(made.data[0].b64_json), native(served, width=32, height=32))
    assert (made.size, made.output_format) == ("32x32", "png")


@pytest.mark.parametrize("format", ["webp", "jpeg"])
def test_formats_carry_their_settings(client, format):
    made = client.generate(prompt="goose", output_format=format, output_compression=50, extra_body=OWN)
    data = base64.b64decode(made.data[0].b64_json)
    assert Image.open(io.BytesIO(data)).format == format.upper()
    assert metadata.read_settings(io.BytesIO(data))["seed"] == 7


def test_addresses_of_pictures(served, client):
    made = client.generate(prompt="goose", response_format="url", model="one", extra_body=OWN)
    assert Image.open(io.BytesIO(served.http.get(made.data[0].url).content)).size == (32, 32)


def test_edits_are_where_the_mask_is_transparent(served, client):
    image, mask = Image.effect_noise((32, 32), 90).convert("RGB"), Image.new("RGBA", (32, 32))
    mask.paste((0, 0, 0, 255), (16, 0, 32, 32))
    made = client.edit(image=png(image), mask=png(mask), prompt="goose", extra_body=OWN)
    edited = image_of(made.data[0].b64_json)
    assert close(np.asarray(edited)[:, 16:], np.asarray(image)[:, 16:])
    assert not close(edited, image)
    whole = client.edit(image=[png(image)], prompt="goose", extra_body={**OWN, "strength": 0.5})
    sent = base64.b64encode(png(image)[1]).decode()
    assert close(image_of(whole.data[0].b64_json), native(served, image=sent, strength=0.5))


def test_partial_images_are_streamed(client):
    given = {**OWN, "num_inference_steps": 100}
    events = list(client.generate(prompt="goose", stream=True, partial_images=2, extra_body=given))
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_generation.completed"
    assert set(kinds[:-1]) == {"image_generation.partial_image"}
    assert [event.partial_image_index for event in events[:-1]] == list(range(len(events) - 1))
    assert image_of(events[-1].b64_json).size == (32, 32)


def test_a_stream_of_an_edit(client):
    image = png(Image.new("RGB", (32, 32), "blue"))
    events = list(client.edit(image=image, prompt="goose", stream=True, extra_body=OWN))
    assert [event.type for event in events] == ["image_edit.completed"]


WRONG = {
    "size": {"size": "1024x1024"},
    "a size that is none": {"size": "large"},
    "n": {"n": 11},
    "quality": {"quality": "hd"},
    "background": {"background": "transparent"},
    "output_format": {"output_format": "svg"},
    "output_compression": {"output_compression": 50},
    "style": {"style": "vivid"},
    "unknown": {"extra_body": {"cfg": 3}},
    "steps": {"extra_body": {"num_inference_steps": "many"}},
}


@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_an_error_of_openai(client, given):
    with pytest.raises(openai.BadRequestError) as caught:
        client.generate(prompt="goose", **given)
    assert caught.value.body["type"] == "invalid_request_error"


def test_a_model_that_is_not_there(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.generate(prompt="goose", model="gpt-image-1")
    assert caught.value.code == "model_not_found"


def test_a_mask_without_transparency(client):
    image = png(Image.new("RGB", (32, 32)))
    with pytest.raises(openai.BadRequestError, match="mask: has no transparency"):
        client.edit(image=image, mask=image, prompt="goose")


def test_models(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any") as client:
        assert [model.id for model in client.models.list()] == ["one", "two"]
        assert client.models.retrieve("two").id == "two"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("three")
