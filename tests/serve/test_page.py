"""The page in headless Chromium, with a real server and the embedded model."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
for needed in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
    pytest.importorskip(needed)
expect = sync_api.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROMPT = "a goose on a blue background"
STEPS = 8
LONG = 120_000  # milliseconds: what compiles on a busy machine
DROP = """([selector, data]) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "picture.png", { type: "image/png" }));
    const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
    document.querySelector(selector).dispatchEvent(event);
}"""
NAMELESS = """(one) =>
    !one.labels?.length && !one.ariaLabel && !one.textContent.trim() && !one.querySelector("img[alt]")"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server with a LoRA's name and the embedded model, on one device."""
    loras, out = tmp_path_factory.mktemp("loras"), tmp_path_factory.mktemp("out")
    (loras / "watercolour.safetensors").write_bytes(b"none")
    options = ["--port", "0", "--loras", str(loras), "--out", str(out)]
    environment = os.environ | {"XLA_FLAGS": ""}  # optimised: it makes many pictures
    command = [sys.executable, "-m", "sdjax", "serve", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        yield server.stdout.readline().strip()
        server.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page at a first visit. Errors of its scripts, and what it would load from elsewhere, fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(LONG)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith((address, "data:", "blob:")) or problems.append(asked.url))
    page.goto(address)
    expect(page.locator("#generate")).to_be_enabled()
    page.fill("#field-num_inference_steps", str(STEPS))
    yield page
    assert not problems
    context.close()


def draw(page: Any, prompt: str = PROMPT) -> None:
    """Asks for a picture and waits until it is done."""
    page.fill("#field-prompt", prompt)
    done = page.locator("#gallery button")
    before = done.count()
    page.keyboard.press("Control+Enter")
    expect(done).to_have_count(before + 1, timeout=LONG)


def newest(page: Any) -> bytes:
    """The file of the newest picture of the gallery."""
    image = page.locator("#gallery button img").first
    expect(image).to_have_attribute("src", re.compile("^pictures/"))  # no longer the preview
    return page.request.get(image.evaluate("image => image.src")).body()


def plain(width: int, height: int) -> str:
    """A PNG without settings, as base64."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), "green").save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def pixels(url: str) -> np.ndarray:
    """Of a data URL."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def test_a_prompt_gives_previews_then_a_picture_with_its_settings(page):
    page.fill("#field-prompt", PROMPT)
    page.fill("#field-count", "2")
    page.fill("#field-num_inference_steps", "25")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#gallery .drawing")).to_have_count(2)
    expect(page.locator("img.preview").first).to_be_visible(timeout=LONG)
    expect(page.locator("#gallery .drawing")).to_have_count(0, timeout=LONG)
    expect(page.locator("#announcer")).to_contain_text("2 pictures done")
    seed = int(page.input_value("#field-seed"))
    page.locator("#gallery button").nth(1).click()
    settings = page.locator("#viewer .settings")
    for text in (PROMPT, "25", "128"):
        expect(settings).to_contain_text(text)
    shown = page.locator("#viewer dt:text-is('Seed') + dd")
    first = int(shown.inner_text())
    other = 2 * seed + 1 - first
    for key, expected in (("ArrowLeft", other), ("ArrowRight", first), ("ArrowLeft", other)):
        page.keyboard.press(key)
        expect(shown).to_have_text(str(expected))
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()


def test_a_picture_that_is_dropped_fills_the_form_and_is_drawn_again(page):
    page.fill("#field-negative_prompt", "a lake")
    page.select_option("#field-scheduler", "euler")
    draw(page)
    before = newest(page)
    page.fill("#field-prompt", "")
    page.fill("#field-negative_prompt", "")
    page.select_option("#field-scheduler", "")
    page.fill("#field-guidance_scale", "9")
    page.evaluate(DROP, ["main", base64.b64encode(before).decode()])
    expect(page.locator("#field-prompt")).to_have_value(PROMPT)
    expect(page.locator("#field-negative_prompt")).to_have_value("a lake")
    expect(page.locator("#field-scheduler")).to_have_value("euler")
    expect(page.locator("#field-guidance_scale")).to_have_value("3")
    expect(page.locator(".lock")).to_have_attribute("aria-pressed", "true")
    draw(page)
    again = newest(page)
    np.testing.assert_array_equal(*(np.asarray(Image.open(io.BytesIO(file))) for file in (before, again)))


def test_a_picture_without_settings_is_what_to_start_from(page):
    page.evaluate(DROP, ["main", plain(96, 64)])
    expect(page.locator("#picture")).to_have_attribute("open", "")
    expect(page.locator("#field-width")).to_have_value("96")
    expect(page.locator("#field-height")).to_have_value("64")
    expect(page.locator("#announcer")).to_contain_text("no settings")
    page.evaluate(DROP, ["main", base64.b64encode(b"none").decode()])
    expect(page.get_by_role("alert")).to_have_text("picture.png is no picture that this browser can read")
    page.evaluate(DROP, [".well", base64.b64encode(b"none").decode()])
    expect(page.locator("#picture .well").first).to_contain_text("That is no picture")


def test_a_mask_is_painted_and_what_is_outside_stays(page):
    draw(page)
    before = np.asarray(Image.open(io.BytesIO(newest(page))), int)
    page.locator("#gallery button").first.click()
    page.click("text=Send to image to image")
    page.click("#paint")
    box = page.locator("#painter canvas").bounding_box()
    page.locator("#painter [type=range]").fill("30")
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.2, steps=4)
    page.mouse.up()
    page.click("text=Use this mask")
    with page.expect_request(lambda asked: asked.method == "POST") as sent:
        draw(page, "an owl on a blue background")
    mask = pixels(sent.value.post_data_json["mask_image"])[..., 0]
    assert mask.shape == before.shape[:2]
    assert mask[26, 64] == 255 and not mask[64:].any() and 0.1 < (mask > 127).mean() < 0.3
    difference = np.abs(np.asarray(Image.open(io.BytesIO(newest(page))), int) - before).max(-1)
    assert difference[mask == 0].max() == 0 and difference[mask == 255].mean() > 8


def test_the_painter_erases_undoes_and_is_used_by_keys(page):
    page.click("#picture summary")
    page.evaluate(DROP, [".well", plain(64, 64)])
    page.click("#paint")
    painted = "document.querySelector('#painter canvas').getContext('2d').getImageData(32, 32, 1, 1).data[3]"
    for key, alpha in (("Space", 255), ("Control+z", 0), ("Space", 255), ("e", 255), ("Space", 0)):
        page.keyboard.press(key)
        assert page.evaluate(painted) == alpha, key
    page.click("#painter >> text=Invert")
    page.click("#painter >> text=Clear")
    page.click("text=Use this mask")
    expect(page.locator("#picture .well.filled")).to_have_count(1)


def test_what_waits_and_runs_is_cancelled(page):
    page.fill("#field-prompt", PROMPT)
    page.fill("#field-num_inference_steps", "150")
    page.fill("#field-count", "4")
    with page.expect_response("**/requests") as asked:
        page.keyboard.press("Control+Enter")
    page.click("#jobs button")
    expect(page.locator("#queue")).to_be_hidden(timeout=LONG)
    expect(page.locator("#gallery .drawing")).to_have_count(0)
    state = page.request.get(f"{page.url}requests/{asked.value.json()['id']}").json()["state"]
    assert state == "cancelled"


def test_a_reload_keeps_the_form_and_picks_up_what_runs(page):
    page.fill("#field-prompt", "a red apple")
    page.click("#more-fields summary")
    page.fill("#field-clip_skip", "1")
    page.click("[aria-label^='Draw a seed']")
    page.fill("#field-num_inference_steps", "150")
    seed = page.input_value("#field-seed")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#gallery .drawing")).to_have_count(1)
    page.click("#picture summary")
    page.evaluate(DROP, [".well", plain(64, 64)])
    expect(page.locator(".well.filled")).to_have_count(1)
    page.reload()
    values = {"prompt": "a red apple", "num_inference_steps": "150", "clip_skip": "1", "seed": seed}
    for name, value in values.items():
        expect(page.locator(f"#field-{name}")).to_have_value(value)
    expect(page.locator("#more-fields")).to_have_attribute("open", "")
    expect(page.locator(".lock")).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".well.filled")).to_have_count(1)
    expect(page.locator("#gallery .drawing img.preview")).to_be_visible(timeout=LONG)
    page.click("#jobs button")
    expect(page.locator("#queue")).to_be_hidden(timeout=LONG)


def test_a_sweep_is_a_labelled_sheet(page):
    page.fill("#field-prompt", PROMPT)
    page.click("#sweep summary")
    page.select_option("#sweep-x", "num_inference_steps")
    page.fill("#sweep-x-values", "2:6:2")
    page.select_option("#sweep-y", "words of the prompt")
    page.fill("#sweep-y-values", "goose, owl")
    expect(page.locator("#generate")).to_contain_text("Generate 4")
    page.click("#generate")
    sheet = page.locator(".sheet")
    expect(sheet.locator("button.frame img")).to_have_count(4, timeout=LONG)
    assert sheet.locator("th").all_inner_texts() == ["2", "4", "goose", "owl"]
    sheet.locator("button.frame").last.click()
    expect(page.locator("#viewer .settings")).to_contain_text("a owl on a blue background")
    expect(page.locator("#viewer dt:text-is('Steps') + dd")).to_have_text("4")
    page.keyboard.press("Escape")
    with page.expect_download() as saved:
        sheet.get_by_text("Save as PNG").click()
    with Image.open(saved.value.path()) as saved_sheet:
        assert min(saved_sheet.size) > 2 * 128
    page.reload()
    expect(page.locator(".sheet button.frame img")).to_have_count(4)
    page.click(".sheet >> text=Close")
    expect(page.locator(".sheet")).to_have_count(0)


def begin_sheet(page: Any, seeds: str) -> int:
    """Has a sheet of these seeds drawn; how many requests there were before."""
    page.fill("#field-prompt", PROMPT)
    page.click("#sweep summary")
    page.select_option("#sweep-x", "seed")
    page.fill("#sweep-x-values", seeds)
    page.fill("#field-num_inference_steps", "40")
    before = len(page.request.get(f"{page.url}requests").json())
    page.click("#generate")
    return before


def test_two_windows_draw_a_sheet_once(page):
    before = begin_sheet(page, "0:5")
    expect(page.locator(".sheet img.preview, .sheet img[src]").first).to_be_visible(timeout=LONG)
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator(".sheet .state")).to_have_text("Another window draws it")
    expect(page.locator(".sheet button.frame img")).to_have_count(5, timeout=LONG)
    expect(other.locator(".sheet button.frame img")).to_have_count(5)
    assert len(page.request.get(f"{page.url}requests").json()) - before == 5
    other.click(".sheet >> text=Close")
    page.reload()
    expect(page.locator("#generate")).to_be_enabled()
    expect(page.locator(".sheet")).to_have_count(0)


def test_a_sheet_goes_on_in_another_window_where_the_first_is_closed(page):
    before = begin_sheet(page, "20:25")
    expect(page.locator(".sheet img[src]").first).to_be_visible(timeout=LONG)
    other = page.context.new_page()
    other.goto(page.url)
    expect(other.locator(".sheet .state")).to_have_text("Another window draws it")
    page.close()
    expect(other.locator(".sheet button.frame img")).to_have_count(5, timeout=LONG)
    assert len(other.request.get(f"{other.url}requests").json()) - before == 5


def test_seeds_beyond_the_numbers_of_javascript(page):
    seed = str(2**64 - 3)
    page.fill("#field-seed", seed)
    with page.expect_request(lambda asked: asked.method == "POST") as sent:
        draw(page)
    assert sent.value.post_data_json["seed"] == seed
    page.fill("#field-seed", "")
    page.locator("#gallery button").first.click()
    expect(page.locator("#viewer dt:text-is('Seed') + dd")).to_have_text(seed)
    page.click("#viewer >> text=Use these settings")
    expect(page.locator("#field-seed")).to_have_value(seed)
    page.reload()
    expect(page.locator("#field-seed")).to_have_value(seed)


def test_settings_say_that_their_picture_is_missing(page):
    page.evaluate(DROP, [".well", plain(128, 128)])
    draw(page)
    page.locator("#gallery button").first.click()
    page.click("#viewer >> text=Use these settings")
    expect(page.get_by_role("alert")).to_contain_text("It was made from a picture")


def test_variations_start_from_the_picture(page):
    draw(page)
    page.locator("#gallery button").first.click()
    with page.expect_request(lambda asked: asked.method == "POST") as sent:
        page.click("#viewer >> text=Vary")
    body = sent.value.post_data_json
    assert (body["prompt"], body["strength"], body["seed"], body["num_inference_steps"]) == (PROMPT, 0.6, None, STEPS)
    assert body["image"].startswith("data:image/png;base64,")
    expect(page.locator("#queue")).to_be_hidden(timeout=LONG)


def test_weights_by_keys(page):
    prompt = page.locator("#field-prompt")
    for text, caret, key, expected in (
        ("a goose", 3, "Up", "a (goose:1.1)"),
        ("a (goose:1.1)", 4, "Up", "a (goose:1.2)"),
        ("a (goose:1.1)", 4, "Down", "a goose"),
        ("a (grey goose:0.5), a lake", 9, "Down", "a (grey goose:0.4), a lake"),
        (r"a \(goose:2) lake", 13, "Down", r"a \(goose:2) (lake:0.9)"),
        ("<lora:watercolour:1> a", 8, "Down", "<lora:watercolour:0.9> a"),
    ):
        prompt.fill(text)
        prompt.evaluate("(input, at) => input.setSelectionRange(at, at)", caret)
        prompt.press(f"Control+Arrow{key}")
        expect(prompt).to_have_value(expected)
        prompt.press("Control+z")
        expect(prompt).to_have_value(text)


def test_loras_are_completed_and_clicked(page):
    page.focus("#field-prompt")
    page.keyboard.type("a goose wat")
    expect(page.locator("[role=option]")).to_have_text("watercolourLoRA")
    page.keyboard.press("Enter")
    expect(page.locator("#field-prompt")).to_have_value("a goose <lora:watercolour:1>")
    chip = page.locator(".chip")
    expect(chip).to_have_attribute("aria-pressed", "true")
    chip.click()
    expect(page.locator("#field-prompt")).to_have_value("a goose")


def test_what_is_wrong_is_said_at_its_field(page):
    page.click("#more-fields summary")
    page.fill("#field-sigmas", "many")
    page.click("#more-fields summary")
    page.fill("#field-prompt", PROMPT)
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("sigmas must be numbers")
    expect(page.locator("#field-sigmas")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#field-sigmas")).to_be_focused()
    page.fill("#field-sigmas", "")
    page.fill("#field-num_inference_steps", "0")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#field-num_inference_steps")).to_be_focused()
    page.fill("#field-num_inference_steps", str(STEPS))
    draw(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_the_model_is_chosen_and_kept(page):
    def with_another(route: Any) -> None:
        known = route.fetch().json()
        route.fulfill(json={**known, "models": [*known["models"], "another"]})

    page.route("**/capabilities", with_another)
    page.reload()
    expect(page.locator("#generate")).to_be_enabled()
    page.select_option("#model", "another")
    page.fill("#field-prompt", PROMPT)
    with page.expect_request(lambda asked: asked.method == "POST") as sent:
        page.keyboard.press("Control+Enter")
    assert sent.value.post_data_json["model"] == "another"
    expect(page.get_by_role("alert")).to_contain_text("another")
    page.reload()
    expect(page.locator("#model")).to_have_value("another")


DENIED = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"


@pytest.mark.parametrize("keeps", [True, False])
def test_the_key_is_asked_for_once_and_sent(page, keeps):
    """keeps: whether the browser lets the page keep anything, which it may not in a frame of another site."""

    def guard(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            route.continue_()
        else:
            route.fulfill(status=401, json={"detail": "the key is missing or wrong"})

    draw(page)
    page.route("**/capabilities", guard)
    page.route("**/pictures**", guard)
    if not keeps:
        page.add_init_script(DENIED)
    page.reload()
    for key, title in (("wrong", "This server asks for its key"), ("secret", "This server has another key")):
        expect(page.locator("#key-title")).to_have_text(title)
        page.fill("#key", key)
        page.keyboard.press("Enter")
    expect(page.locator("#key-dialog")).to_be_hidden()
    expect(page.locator("#gallery img").first).to_have_js_property("complete", True)
    page.reload()
    expect(page.locator("#generate" if keeps else "#key")).to_be_enabled()


def test_the_apis_are_described_without_another_host(page):
    page.goto(f"{page.url}docs")
    part = page.locator("[id='POST/requests']")
    part.locator("summary").click()
    steps = part.locator("tr", has=page.locator("code:text-is('num_inference_steps')"))
    expect(steps.locator("td").first).to_have_text("integer 1…150")
    expect(part.locator("pre")).to_contain_text("""/requests -d '{"prompt":"a goose"}'""")
    page.fill("#filter", "controlnet_conditioning_scale")
    expect(page.locator("details:visible")).to_have_count(3)


def test_every_control_has_a_name_and_a_phone_has_one_column(page):
    for summary in page.locator("summary").all():
        summary.click()
    controls = page.locator("input:visible, select:visible, textarea:visible, button:visible")
    assert controls.evaluate_all(f"all => all.filter({NAMELESS}).map((one) => one.outerHTML)") == []
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    expect(page.locator("#generate")).to_be_in_viewport()
