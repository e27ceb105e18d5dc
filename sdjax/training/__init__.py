"""What trains a Stable Diffusion checkpoint: `train`, a whole run, and its parts.

    train("lora", "pictures/", "style.safetensors", model="sd15.safetensors", max_train_steps=500)

A run is its `options`; `data` and `dataset` are what it is shown, `trainable` what it trains; `steps` makes its steps,
with `checkpoints`, a `log` and `samples`; `run` is all of it. Or one step at a time:

    pipe = sdjax.StableDiffusionPipeline.from_pretrained(model, dtype="bfloat16")
    trained = lora.begin(pipe, lora.Lora(rank=16), jax.random.key(seed), gradient_checkpointing=True)
    objective = Objective.of(pipe.scheduler, snr_gamma=5.0)
    rate = optimizers.schedule("cosine", 1e-4, steps=1000, warmup_steps=50)
    trainer = Trainer(trained, objective, optimizers.create("adamw", rate))

    state = trainer.state()
    for batch in batches:
        state, metrics = trainer(state, batch, jax.random.key(seed))
    trained.save(path, jax.device_get(state.params))

What is trained: `lora.begin`, `words.begin` (textual inversion), `controlnet.begin`, `whole.begin`. Each gives a
`Trained`: arrays by name that are trained, arrays that are not, and how the first are saved and shown:
`trained.save(path, tree, ...)`, and `trained.install(tree)`, after which the pipeline draws with them, to see how far
training is. The options of `save` differ: format and metadata of a LoRA, metadata of a word, dtype of all. A tree is
`state.params`, or `state.ema` where a `Trainer` keeps averages (`ema=0.9999`).

What it is trained for: `Objective`, or `distillation.Consistency`, which makes an LCM-LoRA: few steps, no guidance.

A batch is a dictionary of arrays of NumPy or JAX, B images first:

    moments [B h w 2C]       mean and log variance of the VAE's posterior, not scaled; or
    pixels [B H W 3]         in -1 to 1, where `begin` had pictures_cached=False: the VAE runs in the step
    input_ids                {text encoder: int32 [B L]}; or
    text                     {"hidden": [B L D], "pooled": [B P] for SDXL}, where `begin` had texts_cached=True
    time_ids [B 6]           SDXL alone: original height and width, crop top and left, target height and width
    weights [B]              of each image's loss; the loss is the mean of weight * loss
    mask [B h w 1]           0 to 1, of each pixel of the latents
    control_image [B H W 3]  0 to 1, of ControlNets
    unconditional_input_ids or unconditional_text
                             as those above, of no caption: for distillation

As PyTorch diffusers adds the mean loss of class pictures, times prior_loss_weight p, to that of as many others, their
weights are 2 p and 2. All batches of one form share a compiled step; another size of pictures compiles another one.
B is a multiple of the devices times `accumulation`.

A step's chance is that of (key, state.step): a run whose state was saved and read again goes on bit for bit, given the
same batches. The state is a pytree (`TrainState`): optimiser steps done, what is trained, averages or None, what the
optimiser keeps. `trainer.state()` makes the one to begin with, in whose structure and shardings a saved one is read.

`trainer.lower(batch)` counts memory before anything is there: `.compile().memory_analysis()`.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "train":  # imports JAX
        from sdjax.training.run import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
