"""Fuzzes a server: with schemathesis (pip install schemathesis), which makes requests of its OpenAPI description, with
requests that are right but for a field, of clients that wait, cancel, or go, and at last with so many pictures, while
others ask for what is wrong.

    python scripts/fuzz_serve.py --minutes 5 --model DIR

Whatever is asked for, no answer has a status of 500 or more, and afterwards nothing waits or runs. Prints how many
answers of each API had each status, and the memory before and after; exit status 1 where it is not so.
"""

import argparse
import base64
import io
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

LIMITS = ("--max-steps", "3", "--max-pixels", str(128 * 128), "--places", "2", "--queue", "16")
CHECKS = "not_a_server_error,content_type_conformance"
REQUEST = re.compile(r'sdjax_requests_total\{api="(\w+)",status="(\d+)"\} (\S+)')
CLIENTS = 8
WAITS = (0.001, 0.05, 0.2, 5.0)  # seconds after which a client goes
READY = "/ready"  # which says 503 until it is


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--model", help="a small one, such as the tests make [default: the embedded model]")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = ["--model", given.model] if given.model else []
        command = [sys.executable, "-m", "sdjax", "serve", "--port", "0", "--out", folder, *model, *LIMITS]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            url = server.stdout.readline().strip()
            wait(lambda: status(url + READY) == 200)
            before = metrics(url)
            fuzz(url, given.minutes / 2, given.seed)
            with ThreadPoolExecutor(CLIENTS) as clients:
                deadline = time.monotonic() + given.minutes * 30
                seeds = range(CLIENTS * given.seed, CLIENTS * (given.seed + 1))
                list(clients.map(lambda seed: ask(url, random.Random(seed), deadline), seeds))
                list(clients.map(lambda seed: draw(url, seed, given.pictures), range(CLIENTS)))
            wait(lambda: idle(metrics(url)))
            return report(before, metrics(url), len(list(Path(folder).iterdir())))
        finally:
            server.send_signal(signal.SIGTERM)
            print("exit status of the server:", server.wait(60))


def fuzz(url: str, minutes: float, seed: int) -> None:
    """Asks for all that the description has, for so long."""
    options = ["--checks", CHECKS, "--phases", "coverage,fuzzing", "--continue-on-failure", "--seed", str(seed)]
    options += ["--max-time", str(int(minutes * 60)), "--workers", "4", "--request-timeout", "60", "--warnings", "off"]
    options += ["--suppress-health-check", "all", "--exclude-path", READY]
    subprocess.run(["schemathesis", "run", f"{url}/openapi.json", *options], check=False)


def picture() -> str:
    """As base64."""
    file = io.BytesIO()
    Image.effect_noise((32, 32), 90).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PICTURE = picture()
SIZES = {"width": [32], "height": [32]}
NATIVE = SIZES | {
    "prompt": ["goose", "(goose:1.3) AND a duck", "[a:b:0.5]", "", "g " * 300],
    "negative_prompt": ["red", None],
    "num_inference_steps": [1, 2, 3],
    "guidance_scale": [1, 3.0, 1e6, None],
    "guidance_interval": ["0.3:5", [1, 2]],
    "guidance_rescale": [0.5],
    "scheduler": ["euler", "dpmpp_2m_karras", "heun", "lcm"],
    "image": [PICTURE],
    "mask_image": [PICTURE],
    "strength": [0, 0.5, 1],
    "outpaint": [[8, 0, 0, 0]],
    "padding_mask_crop": [4],
    "mask_blur": [3],
    "soft_mask": [True],
    "hires_scale": [1.5],
    "hires_upscaler": ["latent", "lanczos", "model"],
    "clip_skip": [0, 1, 99],
    "noise": ["jax", "torch", "cuda"],
    "cache_interval": [2],
    "vae_tiling": [True],
    "pag_scale": [3],
    "freeu": [[0.9, 0.2, 1.5, 1.6]],
    "perp_neg_scale": [1],
    "mimic_scale": [7],
    "timesteps": ["999,400,0", [999]],
    "sigmas": ["14,1,0"],
    "control_image": [PICTURE],
    "ip_adapter_image": [PICTURE],
    "controlnet": [["none"], "controlnet"],
    "upscaler": ["none"],
    "eta": [0, 0.5],
    "seed": [0, -1, str(2**64 - 1)],
    "had_image": [True],
    "loras": [{"none": 1}, {}],
    "count": [1, 2],
}
WEB_UI = SIZES | {
    "prompt": ["goose"],
    "steps": [1, 2, 3],
    "sampler_name": ["Euler a", "DPM++ 2M", "DDIM"],
    "scheduler": ["Karras", "Automatic"],
    "n_iter": [1, 2],
    "enable_hr": [True],
    "hr_scale": [1.5],
    "denoising_strength": [0, 0.5, 1],
    "init_images": [[PICTURE], []],
    "mask": [PICTURE],
    "inpainting_fill": [0, 1, 2],
    "resize_mode": [0, 1, 2],
    "override_settings": [{"CLIP_stop_at_last_layers": 2}],
    "eta": [0, 1],
    "alwayson_scripts": [{"controlnet": {"args": [{"image": PICTURE, "model": "none"}]}}, {"ControlNet": {"args": []}}],
}
EXTRAS = {
    "image": [PICTURE],
    "upscaler_1": ["None", "Lanczos", "ESRGAN"],
    "upscaling_resize": [0.5, 2],
    "resize_mode": [0, 1],
    "upscaling_resize_w": [40],
    "upscaling_resize_h": [20],
}
OPENAI = {
    "prompt": ["goose"],
    "size": ["32x32", "auto"],
    "n": [1, 2],
    "stream": [True],
    "partial_images": [0, 3],
    "output_format": ["png", "webp", "jpeg"],
    "output_compression": [50],
    "num_inference_steps": [2],
    "response_format": ["url"],
}
PATHS: dict[str, dict[str, list[Any]]] = {
    "/requests": NATIVE,
    "/sdapi/v1/txt2img": WEB_UI,
    "/sdapi/v1/img2img": WEB_UI,
    "/sdapi/v1/extra-single-image": EXTRAS,
    "/v1/images/generations": OPENAI,
}
WRONG = (None, -1, 0, 1e9, True, "", "x" * 1000, [], {}, [[]], "\ud800", "../../etc/passwd", [1, None], {"a": 1})


def ask(url: str, chance: random.Random, deadline: float) -> None:
    """A client that asks until the deadline; now and then it goes before the answer, or cancels."""
    while time.monotonic() < deadline:
        path, fields = chance.choice(list(PATHS.items()))
        names = {"prompt", *SIZES, *chance.sample(list(fields), chance.randint(0, 4))} & fields.keys()
        body = {name: chance.choice(fields[name]) for name in names}
        body.setdefault("num_inference_steps" if path in ("/requests", "/v1/images/generations") else "steps", 2)
        if chance.random() < 0.3:
            body[chance.choice(list(fields))] = chance.choice(WRONG)
        try:
            answer = httpx.post(url + path, content=json.dumps(body), timeout=chance.choice(WAITS))
            if answer.status_code >= 500:
                print(answer.status_code, path, str(body)[:500], answer.text[:500])
            if path == "/requests" and answer.status_code == 202:
                follow(f"{url}/requests/{answer.json()['id']}", chance)
        except httpx.HTTPError:
            continue


def draw(url: str, number: int, pictures: int) -> None:
    """A client that asks for its share of so many pictures, and waits for each; every other one asks for what is wrong
    as well."""
    paths = ("/sdapi/v1/txt2img", "/v1/images/generations")
    for i in range(pictures // CLIENTS):
        body = {"prompt": "goose", "seed": i, **({"width": 32, "height": 32} if i % 2 == 0 else {"size": "32x32"})}
        body["steps" if i % 2 == 0 else "num_inference_steps"] = 2
        while (answer := httpx.post(url + paths[i % 2], json=body, timeout=300)).status_code == 429:
            time.sleep(1)
        if answer.status_code != 200:
            print(answer.status_code, answer.text[:500])
        if number % 2:
            for path, fields in PATHS.items():
                httpx.post(url + path, json={name: {"a": 1} for name in fields}, timeout=300)


def follow(url: str, chance: random.Random) -> None:
    """Watches a request, cancels it, or forgets it."""
    what = chance.choice(("watch", "cancel", "forget"))
    if what == "watch":
        with httpx.stream("GET", f"{url}/events?previews=1", timeout=chance.choice(WAITS)) as events:
            for _ in events.iter_lines():
                if chance.random() < 0.05:
                    return
    elif what == "cancel":
        httpx.delete(url, timeout=5)


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        return answer.read().decode()


def value(text: str, name: str) -> float:
    return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])


def idle(text: str) -> bool:
    return value(text, "sdjax_waiting") + value(text, "sdjax_running") == 0


def wait(is_so, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError("the server did not become ready, or idle")
        time.sleep(0.2)


def report(before: str, after: str, pictures: int) -> int:
    """Prints what was found; 1 where an answer had a status of 500 or more."""
    counts = Counter({(api, code): int(float(n)) for api, code, n in REQUEST.findall(after)})
    counts.subtract({(api, code): int(float(n)) for api, code, n in REQUEST.findall(before)})
    for (api, code), count in sorted(counts.items()):
        print(f"{api:<8}{code:>5}{count:>8,}")
    memory = [value(text, "process_resident_memory_bytes") / 2**30 for text in (before, after)]
    print(f"{sum(counts.values()):,} answers, {pictures} pictures, {memory[0]:.2f} to {memory[1]:.2f} GiB of memory")
    return int(any(count and int(code) >= 500 for (_, code), count in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
