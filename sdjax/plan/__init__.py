"""What the pipeline's programs take on a TPU, counted by its compiler, without a TPU."""
