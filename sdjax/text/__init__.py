"""Prompts to what the UNet is conditioned on."""
