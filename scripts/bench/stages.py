"""What is measured, and the arrays that every side computes on. NumPy and the standard library alone."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

PICTURE = {
    "prompt": "a photograph of an astronaut riding a horse",
    "negative_prompt": "blurry",
    "guidance_scale": 7.5,
    "output_type": "np",
}
TIMESTEP, TOKENS = 981, 77
NETWORKS = {"text_encoder": "text_encoder", "unet": "unet", "vae": "vae", "vae_encode": "vae"}
"""The component that computes a stage, where it is one"""

LIMITS = {"float32": 1e-3, "float16": 0.2, "bfloat16": 0.2}
"""Of the error, as a part of max |reference|"""


@dataclass(frozen=True)
class Stage:
    """One measurement: the computation, how often it is repeated, its batch, its steps or the size of its matrices."""

    what: str
    rounds: int = 1
    batch: int = 1
    steps: int = 0
    size: int = 0

    @property
    def tiny(self) -> "Stage":
        """The same in a moment, of a tiny model."""
        return replace(self, rounds=2, steps=min(self.steps, 2), size=min(self.size, 64))


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


def config(folder: Path, component: str) -> dict[str, Any]:
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
    side, channels = unet["sample_size"], unet["in_channels"]
    if stage.what == "vae_encode":
        side *= 2 ** (len(config(folder, "vae")["block_out_channels"]) - 1)
        return {"image": np.tanh(normal(stage.batch, side, side, 3))}
    arrays = {"latents": normal(stage.batch, side, side, channels)}
    if stage.what == "unet":
        states = normal(stage.batch, TOKENS, unet["cross_attention_dim"])
        arrays |= {"timestep": np.array(TIMESTEP), "states": states}
        if unet["addition_embed_type"] == "text_time":
            pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
            sizes = np.tile(np.float32([512, 512, 0, 0, 512, 512]), (stage.batch, 1))
            arrays |= {"text_embeds": normal(stage.batch, pooled), "time_ids": sizes}
    return arrays


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def error(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b| / max |b|"""
    return float(np.abs(a - b).max() / np.abs(b).max()) if a.shape == b.shape else float("inf")
