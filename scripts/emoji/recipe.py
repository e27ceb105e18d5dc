"""What the embedded model is: sizes, configurations, rates. See docs/embedded-model.md."""

SIZE = 128
SOURCE_SIZE = 160
PAIRS = 1 / 8  # the share of pictures that have two drawings
CAPTION_DROPOUT = 0.1
SQUARES = 4  # a side; the last 16 tokens speak of one each
READING_WEIGHT = 0.1
ROUNDS = 39  # latents of every drawing: each background three times

VAE = {
    "block_out_channels": (16, 32, 64, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "sample_size": SIZE,
    "force_upcast": False,
}
KL_WEIGHT = 1e-4
UNET = {
    "sample_size": SIZE // 8,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (64, 128, 224),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "only_cross_attention": (True, False, False),  # at 16x16, two attentions of 8 heads: one for each place of a square
    "layers_per_block": 1,
    "attention_head_dim": (8, 4, 4),  # heads, in spite of the name
    "cross_attention_dim": 192,
    "norm_num_groups": 16,
    "use_linear_projection": True,
}
TEXT = {
    "hidden_size": 192,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
}
VOCABULARY = 3072
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,  # without effect here; PyTorch's pipeline warns of another
}
CONTROLNET = {
    "down_block_types": ("DownBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2D",
    "conditioning_embedding_out_channels": (8, 16, 32, 64),
}
"""What it does not have from the UNet."""
CONTROL_ROUNDS = 6
EMPTY_CAPTIONS = 0.5  # for the ControlNet
