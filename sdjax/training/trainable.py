"""What a run trains, and how, as its options have it."""

import optax
from jax import Array
from jax.sharding import Mesh

from sdjax.pipeline import StableDiffusionPipeline
from sdjax.text.conditioning import TEXT_TIME
from sdjax.training import controlnet, lora, optimizers, whole, words
from sdjax.training.distillation import Consistency
from sdjax.training.lora import Lora
from sdjax.training.objective import Objective
from sdjax.training.options import CONTROLNET, INVERSION, Options
from sdjax.training.trained import Trained
from sdjax.training.trainer import Trainer

EMA = 0.9999


def begin(options: Options, pipe: StableDiffusionPipeline, key: Array) -> Trained:
    """What is trained, as it begins. Raises ValueError for a model of which it cannot be."""
    if pipe.unet.config.addition_embed_type == TEXT_TIME and pipe.text_encoder is None:
        raise ValueError("SDXL's refiner, which is conditioned on how beautiful pictures are, is not trained here")
    if options.lcm and pipe.unet.config.addition_embed_type == TEXT_TIME and not options.caches_texts:
        raise ValueError("lcm: with SDXL not with shuffle_caption or train_text_encoder")
    how = {
        "texts_cached": options.caches_texts,
        "pictures_cached": options.cache_latents,
        "gradient_checkpointing": options.gradient_checkpointing,
    }
    if options.is_low_rank:
        return lora.begin(pipe, _lora(options), key, **how)
    if options.method == INVERSION:
        del how["texts_cached"]
        word = options.placeholder_token, options.initializer_token
        return words.begin(pipe, *word, vectors=options.num_vectors, **how)
    if options.method == CONTROLNET:
        return controlnet.begin(pipe, **how)
    return whole.begin(pipe, train_text_encoder=options.train_text_encoder, **how)


def _lora(options: Options) -> Lora:
    return Lora(
        rank=options.rank,
        alpha=options.lora_alpha,
        targets=options.target_modules,
        text_encoder_targets=lora.TEXT_ENCODER if options.train_text_encoder else (),
        conv_rank=options.conv_rank,
        use_dora=options.use_dora,
    )


def trainer(options: Options, pipe: StableDiffusionPipeline, trained: Trained, mesh: Mesh) -> Trainer:
    """Its steps."""
    objective = Objective.of(
        pipe.scheduler,
        zero_terminal_snr=options.rescale_betas_zero_snr,
        snr_gamma=options.snr_gamma,
        noise_offset=options.noise_offset,
        input_perturbation=options.input_perturbation,
        timestep_bias_strategy=options.timestep_bias_strategy,
        timestep_bias_multiplier=options.timestep_bias_multiplier,
        timestep_bias_portion=options.timestep_bias_portion,
        timestep_bias_begin=options.timestep_bias_begin,
        timestep_bias_end=options.timestep_bias_end,
    )
    return Trainer(
        trained,
        _consistency(options, objective) if options.lcm else objective,
        _optimizer(options),
        mesh=mesh,
        accumulation=options.gradient_accumulation_steps,
        ema=EMA if options.use_ema else None,
    )


def _consistency(options: Options, objective: Objective) -> Consistency:
    return Consistency(
        objective=objective,
        solver_steps=options.num_ddim_timesteps,
        guidance_range=(options.w_min, options.w_max),
        huber_c=options.huber_c,
    )


def _optimizer(options: Options) -> optax.GradientTransformation:
    rate = optimizers.schedule(
        options.lr_scheduler,
        options.rate,
        steps=options.max_train_steps,
        warmup_steps=options.lr_warmup_steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )
    return optimizers.create(
        options.optimizer,
        rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        weight_decay=options.adam_weight_decay,
        max_grad_norm=options.max_grad_norm,
    )
