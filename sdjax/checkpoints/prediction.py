"""What a model predicts, as the header of its file or the .yaml beside it states it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.folder import read_text

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPELLINGS = {
    **{name: name for name in PREDICTION_TYPES},
    "eps": "epsilon",
    **dict.fromkeys(("v", "v_pred", "vpred"), "v_prediction"),
    "x0": "sample",
}
"""Of the standard modelspec, of trainers, of the configs of the original repositories"""
HEADER = ("modelspec.prediction_type", "modelspec.predict_key")
"""The second is what ComfyUI writes"""
ARCHITECTURE = "modelspec.architecture"
ARCHITECTURES = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}
YAML = (
    re.compile(r"""^[^#\n]*\bparameterization["']?[ \t]*:[ \t]*["']?([\w-]+)""", re.MULTILINE),
    re.compile(r"^[^#\n]*\bdenoiser_scaling\.(V|Eps)Scaling\b", re.MULTILINE),
)
"""The one line that states it in a config of LDM and in one of SGM"""


def check(prediction_type: str | None) -> None:
    """Raises ValueError for one that there is not; None is fine."""
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise ValueError(f"prediction_type={prediction_type!r}: one of {', '.join(PREDICTION_TYPES)}")


def stated(path: Path, metadata: Mapping[str, str]) -> str | None:
    """The prediction type that a file's metadata or else the .yaml of the same name beside it states; None: neither.

    Raises CheckpointError that names the source of an unknown value.
    """
    for where, value in _statements(path, metadata):
        spelling = value.strip().lower().replace("-", "_")
        if spelling not in SPELLINGS:
            raise CheckpointError(
                f"{where} states the prediction type {value!r}, none of {', '.join(SPELLINGS)}; "
                "give prediction_type (--prediction-type)"
            )
        return SPELLINGS[spelling]
    return None


def _statements(path: Path, metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(where, value), what counts first."""
    yield from ((f"{path}: its header", metadata[name]) for name in HEADER if metadata.get(name))
    if known := ARCHITECTURES.get(metadata.get(ARCHITECTURE, "").strip().lower()):
        yield f"{path}: its header", known
    beside = path.with_suffix(".yaml")
    if beside.is_file():
        text = read_text(beside, errors="replace")
        yield from ((str(beside), found[1]) for line in YAML if (found := line.search(text)))
