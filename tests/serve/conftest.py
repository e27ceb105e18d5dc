"""One server of a tiny model, in a process of its own, for all tests of this folder that ask it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

ENVIRONMENT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"}
SECONDS = 120  # for a server to listen


@dataclass
class Served:
    """A server's process, and a client of it."""

    process: subprocess.Popen
    url: str
    http: httpx.Client = field(init=False)

    def __post_init__(self):
        self.http = httpx.Client(base_url=self.url, timeout=SECONDS)

    @property
    def port(self) -> int:
        return httpx.URL(self.url).port

    def ended(self, order: str) -> dict:
        """Waits until what was asked for has ended."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            found = self.http.get(f"/requests/{order}").json()
            if found["state"] not in ("queued", "running"):
                return found
            time.sleep(0.05)
        raise TimeoutError(found)

    def drawn(self, **request) -> dict:
        """Waits for the pictures of a request."""
        answer = self.http.post("/requests", json=request)
        assert answer.status_code == 202, answer.text
        return self.ended(answer.json()["id"])


def start(*options: str | Path) -> Served:
    """A server with these options, on a port that is free."""
    command = [sys.executable, "-m", "sdjax", "serve", "--port", "0", *map(str, options)]
    environment = {**os.environ, **ENVIRONMENT}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline().strip()
    assert line.startswith("http"), line
    return Served(process, line)


def stop(served: Served) -> int:
    """Ends it as a system does, and returns its exit status."""
    served.http.close()
    served.process.send_signal(signal.SIGTERM)
    try:
        status = served.process.wait(SECONDS)
    finally:
        served.process.kill()
    served.process.stdout.close()
    return status


@pytest.fixture(scope="session")
def folders(tmp_path_factory, one_level_folder) -> dict[str, Path]:
    """A folder of two models, of which the second has another sampler, and of networks; of a LoRA; and of a word."""
    import diffusers
    import lora_files
    import oracle
    import test_controlnet
    import test_rrdbnet
    import torch
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("served")
    names = ("models", "loras", "embeddings", "out")
    for name in names:
        (root / name).mkdir()
    (root / "models" / "one").symlink_to(one_level_folder)
    shutil.copytree(one_level_folder, root / "models" / "two")
    config = root / "models" / "two" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("PNDMScheduler", "DDIMScheduler"))
    index = root / "models" / "two" / "model_index.json"
    index.write_text(index.read_text().replace("PNDMScheduler", "DDIMScheduler"))
    unet = diffusers.UNet2DConditionModel.from_pretrained(one_level_folder, subfolder="unet")
    save_file(lora_files.kohya(lora_files.factors({"unet": unet}, 2)), root / "loras" / "style.safetensors")
    (root / "models" / "ESRGAN").mkdir()
    save_file(test_rrdbnet.tensors(4), root / "models" / "ESRGAN" / "sharp.safetensors")
    controlnets = {"edges": oracle.ONE_LEVEL, "depth": oracle.ONE_LEVEL, "wide": oracle.SD1}
    for seed, (name, family) in enumerate(controlnets.items()):
        network = test_controlnet.controlnet(family, seed, **test_controlnet.HINT)
        network.save_pretrained(root / "models" / "ControlNet" / name)
    vector = torch.randn(1, oracle.ONE_LEVEL.text["hidden_size"], generator=torch.Generator().manual_seed(0))
    save_file({"emb_params": vector}, root / "embeddings" / "fluffy.safetensors")
    return {name: root / name for name in names}


@pytest.fixture(scope="session")
def served(folders) -> Iterator[Served]:
    """Of a tiny model, with folders to choose from and one for the pictures."""
    options = [text for name, path in folders.items() for text in (f"--{name}", path)]
    served = start(*options, "--places", "2", "--max-pixels", 128 * 128, "--queue", "8")
    yield served
    assert stop(served) == 0
