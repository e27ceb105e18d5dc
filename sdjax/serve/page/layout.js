/** What fields are called, and where in the form they stand; those not named here are in "More". */

/** Labels of fields whose names do not read well. */
export const LABELS = {
  negative_prompt: "Negative prompt",
  prompt_2: "Second encoder's prompt",
  negative_prompt_2: "Second encoder's negative prompt",
  scheduler: "Sampler",
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  cfg_plus_plus: "CFG++",
  perp_neg_scale: "Perp-Neg scale",
  image: "Picture",
  mask_image: "Mask",
  padding_mask_crop: "Work on the mask alone, pixels around",
  keep_unmasked: "Keep the pixels outside the mask",
  pag_scale: "PAG scale",
  pag_applied_layers: "PAG layers",
  freeu: "FreeU",
  control_image: "Control picture",
  controlnet_conditioning_scale: "Control weight",
  control_guidance_start: "From",
  control_guidance_end: "To",
  control_preprocessor: "Preprocessor",
  ip_adapter_image: "Picture as a prompt",
  ip_adapter_mask: "Where it acts",
  ip_adapter_scale: "IP-Adapter's weight",
  crops_coords_top_left: "Crop begins at",
  negative_crops_coords_top_left: "Negative crop begins at",
  had_image: "Made from a picture",
  hires_scale: "Times as large",
  hires_strength: "Strength",
  hires_upscaler: "Upscaler",
  vae_tiling: "VAE tiling",
};

/** The folded parts of the form between the first fields and "More". */
export const SECTIONS = [
  {
    id: "picture",
    title: "Start from a picture",
    fields: [
      "image",
      "mask_image",
      "strength",
      "mask_blur",
      "soft_mask",
      "keep_unmasked",
      "padding_mask_crop",
      "outpaint",
      "image_guidance_scale",
      "noise_level",
    ],
  },
  {
    id: "control",
    title: "Control",
    needs: "controls",
    fields: [
      "control_image",
      "control_mode",
      "control_preprocessor",
      "controlnet_conditioning_scale",
      "control_guidance_start",
      "control_guidance_end",
      "guess_mode",
    ],
  },
  { id: "hires", title: "Larger (hires fix)", fields: ["hires_scale", "hires_strength", "hires_upscaler"] },
];

/** How the fields of "More" are grouped; the rest comes last. */
export const GROUPS = {
  Sampling: [
    "prompt_syntax",
    "clip_skip",
    "timestep_spacing",
    "noise",
    "timesteps",
    "sigmas",
    "cache_interval",
    "vae_tiling",
  ],
  Guidance: [
    "guidance_rescale",
    "guidance_interval",
    "cfg_plus_plus",
    "perp_neg_scale",
    "mimic_scale",
    "threshold_percentile",
    "pag_scale",
    "pag_applied_layers",
    "freeu",
  ],
  "A picture as a prompt": ["ip_adapter_image", "ip_adapter_mask", "ip_adapter_scale"],
  SDXL: [
    "prompt_2",
    "negative_prompt_2",
    "original_size",
    "negative_original_size",
    "crops_coords_top_left",
    "negative_crops_coords_top_left",
    "target_size",
    "negative_target_size",
    "aesthetic_score",
    "negative_aesthetic_score",
  ],
};

/** Numbers that are best chosen on a slider: [least, most, step, where it stands while the field is empty]. */
export const SLIDERS = {
  num_inference_steps: [1, 100, 1, 50],
  guidance_scale: [1, 20, 0.1, 7.5],
  strength: [0, 1, 0.01, 0.8],
  hires_strength: [0, 1, 0.01, 0.7],
  mask_blur: [0, 64, 1, 0],
};

/** Fields that the form has in its own way, in its order. */
export const FIRST = [
  "prompt",
  "negative_prompt",
  "scheduler",
  "num_inference_steps",
  "guidance_scale",
  "width",
  "height",
  "seed",
  "count",
];

/**
 * A field's label: "mask_blur" -> "Mask blur".
 * @param {string} name
 */
export function labelOf(name) {
  const words = name.replaceAll("_", " ");
  return LABELS[name] ?? words[0].toUpperCase() + words.slice(1);
}
