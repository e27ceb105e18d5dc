"""What a picture is, and how each part of it is checked, read and written."""

from sdjax.request.request import (
    FIELDS,
    ID_BYTES,
    Request,
    Spec,
    TableKey,
    for_images,
    from_settings,
    image_count,
    spec,
    spread,
)

__all__ = [
    "FIELDS",
    "ID_BYTES",
    "Request",
    "Spec",
    "TableKey",
    "for_images",
    "from_settings",
    "image_count",
    "spec",
    "spread",
]
