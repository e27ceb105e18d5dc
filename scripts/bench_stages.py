"""What `bench.py` measures, and the inputs that every side computes on. NumPy and the standard library alone."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PROMPT, NEGATIVE_PROMPT = "a photograph of an astronaut riding a horse", "blurry"
GUIDANCE_SCALE = 7.5
TIMESTEP = 981
TOKENS = 77


@dataclass(frozen=True)
class Stage:
    """One measurement: the computation, how often it is repeated, its batch, its steps or the size of its matrices."""

    what: str
    rounds: int
    batch: int = 1
    steps: int = 0
    size: int = 0

    @property
    def unet_calls(self) -> int:
        """Calls of the UNet, each on two samples a picture: guidance is on."""
        return self.steps if self.what == "picture" else int(self.what == "unet")


HOST = {
    "matmul": Stage("matmul", rounds=5, size=4096),
    "text_encoder": Stage("text_encoder", rounds=9),
    "unet": Stage("unet", rounds=5, batch=2),
    "vae": Stage("vae", rounds=4),
    "picture": Stage("picture", rounds=3, steps=4),
}
ACCELERATOR = {
    "matmul": Stage("matmul", rounds=9, size=8192),
    "text_encoder": Stage("text_encoder", rounds=9),
    "unet": Stage("unet", rounds=9, batch=2),
    "vae": Stage("vae", rounds=9),
    "picture": Stage("picture", rounds=5, steps=50),
    "pictures": Stage("picture", rounds=5, batch=8, steps=50),
}
STAGES = {"cpu": HOST, "gpu": ACCELERATOR, "tpu": ACCELERATOR}
"""By device, then by name"""


def config(folder: Path, component: str) -> dict:
    """The `config.json` of a component."""
    return json.loads((folder / component / "config.json").read_text())


def inputs(folder: Path, stage: Stage) -> dict[str, np.ndarray]:
    """The arrays that a stage computes on, float32 or integers, NHWC: the same every time."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    if stage.what == "matmul":
        return {"a": normal(stage.size, stage.size), "b": normal(stage.size, stage.size)}
    if stage.what == "text_encoder":
        return {"ids": random.integers(0, config(folder, "text_encoder")["vocab_size"], (stage.batch, TOKENS))}
    unet = config(folder, "unet")
    latents = {"latents": normal(stage.batch, unet["sample_size"], unet["sample_size"], unet["in_channels"])}
    return latents | (
        {"states": normal(stage.batch, TOKENS, unet["cross_attention_dim"])} if stage.what == "unet" else {}
    )
