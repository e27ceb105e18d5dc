"""Weight files that are no Stable Diffusion checkpoint, named from their keys."""

import re
from collections.abc import Iterable
from pathlib import Path

from sdjax.checkpoints.errors import CheckpointError

MODEL = r"^(?:model\.diffusion_model\.|transformer\.|net\.)?"
NAMED = (
    (r"^ip_adapter\.|^image_proj\.", "IP-Adapter"),  # FaceID's have LoRAs in them
    (r"[._]lora[._](?:up|down|A|B|mid)\b|^lora_(?:unet|te)|\.(?:hada_w1_a|lokr_w1|oft_blocks|oft_diag)\b", "LoRA"),
    (r"^(?:emb_params|string_to_param\b.*|string_to_token\b.*|clip_[lg]|<[^.]+>)$", "textual inversion"),
    (r"\.(?:absmax|SCB|qweight|scale_weight|weight_scale)$|\.quant_state\b|(?:^|\.)scaled_fp8$", "quantised"),
    (MODEL + r"(?:single_stream_modulation|early_stream_modulations)\.", "Flux 2"),
    (MODEL + r"distilled_guidance_layer\.", "Chroma"),
    (MODEL + r"txt_in\.individual_token_refiner\.", "HunyuanVideo"),
    (MODEL + r"double_stream_blocks\.", "HiDream"),
    (MODEL + r"(?:double_blocks|single_transformer_blocks)\.", "Flux"),
    (MODEL + r"(?:joint_blocks|context_embedder)\.", "SD 3"),
    (MODEL + r"(?:double_layers|cond_seq_linear)\.", "AuraFlow"),
    (MODEL + r"(?:clip_txt_mapper|clip_mapper|effnet_mapper|down_blocks\.\d+\.\d+\.channelwise)\.", "Stable Cascade"),
    (MODEL + r"(?:mlp_t5\.|text_embedding_padding$)", "Hunyuan-DiT"),
    (MODEL + r"patchify_proj\.", "LTX-Video"),
    (MODEL + r"blocks\.\d+\.mlp\.inverted_conv\.", "Sana"),
    (MODEL + r"(?:t_block\.1|adaln_single)\.", "PixArt"),
    (MODEL + r"head\.modulation$", "Wan"),
    (MODEL + r"cap_embedder\.", "Lumina or Z-Image"),
    (MODEL + r"transformer_blocks\.\d+\.img_mod\.", "Qwen-Image"),
    (MODEL + r"blocks\.\d+\.attn\.qkv_x\.", "Mochi"),
    (r"^lllite_unet", "ControlNet-LLLite"),
    (r"\bmotion_modules\.", "AnimateDiff"),
    (r"\.(?:time_stack|time_mixer|temporal_transformer_blocks)\b", "Stable Video Diffusion"),
    (r"^(?:embedder\.model\.visual|noise_augmentor)\.", "Stable unCLIP"),
    (r"^cc_projection\.", "Stable Zero123"),
    (r"^depth_model\.", "SD 2 depth"),
    (MODEL + r"(?:label_emb|class_embedding)\.weight$|^low_scale_model\.", "SD x4 upscaler"),
    (r"^edm_mean$", "Playground v2.5"),
    (r"^edm_vpred\.", "CosXL"),
    (r"\.fuser\.", "GLIGEN"),
    (r"^first_stage_model\.quantize\.|^quantize\.embedding", "an autoencoder of VQ codes"),
    (r"^cond_stage_model\.transformer\.token_emb\.", "latent diffusion with BERT, older than Stable Diffusion"),
    (r"^(?:transformer\.)?encoder\.block\.\d+\.layer\.", "T5 text encoder"),
)
"""(pattern, what holds a key like that): the first that is found names the file."""

INSTEAD = {
    "LoRA": "a LoRA, no model: load a model, then give this file to load_lora",
    "textual inversion": "a textual inversion embedding, no model: load a model, then give this file to "
    "load_textual_inversion",
    "Stable unCLIP": "Stable unCLIP in one file, which is not supported: give its folder, of diffusers' layout",
    "SD x4 upscaler": "the x4 upscaler in one file, which is not supported: give its folder, of diffusers' layout",
    "IP-Adapter": "an IP-Adapter, no model: load a model, then give this file to load_ip_adapter",
    "quantised": "quantised weights (bitsandbytes, GPTQ, scaled float8), which are not supported: take the checkpoint "
    "in float16, bfloat16 or float32",
}


def refuse(path: Path, names: Iterable[str]) -> None:
    """Raises CheckpointError that names the kind of a file that is known not to be supported."""
    text = "\n".join(names)
    for pattern, kind in NAMED:
        if found := re.search(pattern, text, re.MULTILINE):
            key = text[text.rfind("\n", 0, found.start()) + 1 :].split("\n", 1)[0]
            what = INSTEAD.get(kind, f"{kind}, which is not supported (SD 1, SD 2 and SDXL are)")
            raise CheckpointError(f"{path}: {what}; it has the key {key}")
