"""What trains a Stable Diffusion checkpoint: losses, one optimiser step, a run of them, its state on disk."""
