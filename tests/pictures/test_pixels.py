"""sdjax.pictures.pixels: conversion."""

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor

from sdjax.pictures.pixels import denormalize, to_pil, to_uint8


def test_conversion_is_that_of_diffusers():
    images = np.random.default_rng(0).normal(size=(2, 24, 16, 3)).astype(np.float32)
    images[0, 0, :, 0] = np.linspace(-1, 1, 16)
    processor, nchw = VaeImageProcessor(), torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    np.testing.assert_array_equal(denormalize(images), processor.postprocess(nchw, output_type="np"))
    expected = processor.postprocess(nchw, output_type="pil")
    for ours, theirs in zip(to_pil(images), expected, strict=True):
        assert (ours.mode, ours.size) == ("RGB", (16, 24))
        np.testing.assert_array_equal(ours, theirs)


def test_uint8_rounds_and_clips():
    levels = np.arange(256)
    np.testing.assert_array_equal(to_uint8(levels / 127.5 - 1), levels)
    np.testing.assert_array_equal(to_uint8((levels + 0.4) / 127.5 - 1), levels)
    np.testing.assert_array_equal(to_uint8(np.array([-np.inf, -1.1, 1.1, np.inf])), [0, 0, 255, 255])
