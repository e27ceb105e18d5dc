"""What trains a Stable Diffusion checkpoint: `train`, a whole run, and its parts.

    train("lora", "pictures/", "style.safetensors", model="sd15.safetensors", max_train_steps=500)

A run is its `options`; `data` is what it is shown; `lora` and its like are what is trained, `objective` what it
minimises, `trainer` a step of it; `steps` makes one after the other, with `checkpoints`, a `log` and `samples`.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "train":  # imports JAX
        from sdjax.training.run import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
