"""What other tools call what sdjax has: the answer to an unknown argument, option, key, attribute or name."""

import difflib
from collections.abc import Iterable

CALLED = {
    # what makes a picture
    "adapter_conditioning_factor": "control_guidance_end",
    "adapter_conditioning_scale": "controlnet_conditioning_scale",
    "batch_size": "num_images_per_prompt",
    "callback_on_step_end": "callback",
    "callback_steps": "callback, which is called at every step",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "control_scale": "controlnet_conditioning_scale",
    "cross_attention_kwargs": "set_loras, which gives LoRAs their weights",
    "eta": "an option of the scheduler: pipe.scheduler = {**pipe.scheduler.config, 'eta': 1.0}",
    "generator": "seed",
    "guidance": "guidance_scale",
    "denoising_strength": "strength",
    "depth": "depth_map",
    "enable_hr": "hires_scale",
    "hr_scale": "hires_scale",
    "hr_upscaler": "hires_upscaler",
    "image_cfg_scale": "image_guidance_scale",
    "inpaint_full_res_padding": "padding_mask_crop",
    "init_image": "image",
    "ip_adapter_masks": "ip_adapter_mask",
    "init_images": "image",
    "mask": "mask_image",
    "n_iter": "num_images_per_prompt",
    "loras": "load_lora and set_loras, before the call",
    "neg_scale": "perp_neg_scale",
    "negative": "negative_prompt",
    "num_images": "num_images_per_prompt",
    "return_dict": "nothing: a call returns a StableDiffusionPipelineOutput, whose images are .images",
    "sampler": "scheduler",
    "sampler_name": "scheduler",
    "seeds": "seed",
    "size": "width and height",
    "steps": "num_inference_steps",
    "tiling": "vae_tiling",
    # what loads a pipeline
    "cache_dir": "the environment variable HF_HOME",
    "custom_pipeline": "nothing: there is one pipeline",
    "device_map": "mesh",
    "local_files_only": "the environment variable HF_HUB_OFFLINE=1",
    "torch_dtype": "dtype",
    "use_safetensors": "nothing: safetensors are preferred where there are any",
    # what a pipeline does
    "cuda": "nothing: arrays are where JAX's devices are; give mesh to from_pretrained to choose some",
    "delete_adapters": "unload_loras",
    "disable_attention_slicing": "nothing: attention is computed in blocks where that saves memory",
    "disable_vae_slicing": "nothing: few pictures at a time are decoded",
    "enable_freeu": "freeu, an argument of the call: s1, s2, b1, b2",
    "disable_freeu": "freeu=None, an argument of the call",
    "set_pag_applied_layers": "pag_applied_layers, an argument of the call",
    "enable_attention_slicing": "nothing: attention is computed in blocks where that saves memory",
    "enable_model_cpu_offload": "nothing: parameters stay on the devices of the mesh",
    "enable_sequential_cpu_offload": "nothing: parameters stay on the devices of the mesh",
    "enable_vae_slicing": "nothing: few pictures at a time are decoded",
    "enable_vae_tiling": "vae_tiling=True, an argument of the call",
    "enable_xformers_memory_efficient_attention": "nothing: attention never holds the whole matrix on an accelerator",
    "fuse_lora": "load_lora, which merges it into the weights",
    "load_lora_weights": "load_lora",
    "set_adapters": "set_loras",
    "set_ip_adapter_scale": "ip_adapter_scale, an argument of the call",
    "to": "nothing: arrays are where JAX's devices are; give mesh to from_pretrained to choose some",
    "unet_params": "params",
    "unload_lora_weights": "unload_loras",
    # names of the package
    "DiffusionPipeline": "StableDiffusionPipeline",
    "FlaxStableDiffusionPipeline": "StableDiffusionPipeline",
    "LatentConsistencyModelPipeline": "StableDiffusionPipeline, with the scheduler 'lcm'",
    "StableDiffusionXLPipeline": "StableDiffusionPipeline",
    "StableDiffusionAdapterPipeline": "StableDiffusionPipeline, with adapter",
    "StableDiffusionXLAdapterPipeline": "StableDiffusionPipeline, with adapter",
    "AutoPipelineForText2Image": "StableDiffusionPipeline",
    "AutoPipelineForImage2Image": "StableDiffusionPipeline, with image",
    "AutoPipelineForInpainting": "StableDiffusionPipeline, with image and mask_image",
    "MultiControlNetModel": "a list of them: from_pretrained(model, controlnet=[...])",
    "StableDiffusionControlNetPipeline": "StableDiffusionPipeline, with controlnet and control_image",
    "StableDiffusionXLControlNetPipeline": "StableDiffusionPipeline, with controlnet and control_image",
    "StableDiffusionXLControlNetUnionPipeline": "StableDiffusionPipeline, with controlnet and control_mode",
    "StableDiffusionDepth2ImgPipeline": "StableDiffusionPipeline, with image and depth_map",
    "StableDiffusionLatentUpscalePipeline": "StableDiffusionPipeline, with image",
    "StableDiffusionUpscalePipeline": "StableDiffusionPipeline, with image",
    "StableUnCLIPImg2ImgPipeline": "StableDiffusionPipeline, with image",
    "T2IAdapter": "a path or Hub id: from_pretrained(model, adapter=...)",
    "StableDiffusionInstructPix2PixPipeline": "StableDiffusionPipeline, with image",
    "StableDiffusionPAGPipeline": "StableDiffusionPipeline, with pag_scale",
    "StableDiffusionXLPAGPipeline": "StableDiffusionPipeline, with pag_scale",
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline, with image and mask_image",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionPipeline, with image and mask_image",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline, with image",
    "StableDiffusionXLImg2ImgPipeline": "StableDiffusionPipeline, with image",
}
"""Names of diffusers, of the web UI and of the command, and what stands for each here"""

SCHEDULERS = ("Scheduler", "SchedulerMixin")


def hint(name: object, known: Iterable[str], *, every: bool = True) -> str:
    """The end of a message about an unknown name: what it is called here, a close name, or (every) all known ones."""
    name, names = str(name)[:80], list(known)
    if name in CALLED:
        return f"; here it is {CALLED[name]}"
    if name.endswith(SCHEDULERS):
        return f"; samplers have names: pipe.scheduler = {name!r}, or one of `sdjax samplers`"
    if close := difflib.get_close_matches(name, names, n=1):
        return f"; did you mean {close[0]}?"
    return f"; known are {', '.join(names)}" if every and names else ""
