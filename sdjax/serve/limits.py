"""How much a request may ask for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one request; what is beyond is refused before anything is computed."""

    pixels: int = 2048 * 2048
    """of a picture, after it was made larger"""
    steps: int = 150
    count: int = 16
    """pictures"""
    text: int = 20_000
    """characters of a prompt"""
    chunks: int = 512
    """of tokens, of all texts that a prompt has from row to row"""
    source_pixels: int = 2**25
    """of a picture that is sent"""
    sent_pixels: int = 2**27
    """of all pictures that are sent with one request"""
    body: int = 2**26
    """bytes"""
    bodies: int = 2**28
    """bytes, of all requests that are not answered yet"""
    forms: int = 32
    """of pictures that have compiled programs at once, of all requests together"""
    held_pixels: int = 2**28
    """of pictures that were sent and are still needed, of all requests together"""
