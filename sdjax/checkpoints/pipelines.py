"""The pipeline classes of PyTorch diffusers that model_index.json may name, with or without the prefix Flax."""

from collections.abc import Mapping
from pathlib import Path

from sdjax.checkpoints import folder
from sdjax.checkpoints.errors import CheckpointError
from sdjax.fields import brief

WITH_CONTROLNET: Mapping[str, str] = {
    f"{family}{task}Pipeline": f"{family}ControlNet{task}Pipeline"
    for family in ("StableDiffusion", "StableDiffusionXL")
    for task in ("", "Img2Img", "Inpaint")
}
WITH_UNION: Mapping[str, str] = {
    f"StableDiffusionXL{task}Pipeline": f"StableDiffusionXLControlNetUnion{task}Pipeline"
    for task in ("", "Img2Img", "Inpaint")
}
WITH_ADAPTER: Mapping[str, str] = {
    f"{family}Pipeline": f"{family}AdapterPipeline" for family in ("StableDiffusion", "StableDiffusionXL")
}
"""The class of a pipeline without, and with ControlNets, ControlNet-Unions, T2I-Adapters"""

UNEXPECTED = {
    "StableDiffusionUpscalePipeline": ("requires_safety_checker", "image_encoder"),
    "StableDiffusionLatentUpscalePipeline": (
        *("requires_safety_checker", "safety_checker", "feature_extractor", "image_encoder"),
    ),
    "StableUnCLIPImg2ImgPipeline": ("requires_safety_checker", "safety_checker"),
}
"""What PyTorch's pipelines of these classes do not take, others do"""
SUPPORTED = (
    *WITH_CONTROLNET,
    *WITH_CONTROLNET.values(),
    *WITH_UNION.values(),
    *WITH_ADAPTER.values(),
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    *UNEXPECTED,
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)

READ_AS = {
    "StableDiffusionPAGPipeline": "StableDiffusionPipeline",
    "StableDiffusionPAGImg2ImgPipeline": "StableDiffusionImg2ImgPipeline",
    "StableDiffusionPAGInpaintPipeline": "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPAGPipeline": "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetPAGInpaintPipeline": "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionXLPAGPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline": "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLPAGInpaintPipeline": "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPAGPipeline": "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": "StableDiffusionXLControlNetImg2ImgPipeline",
    "LEditsPPPipelineStableDiffusionXL": "StableDiffusionXLPipeline",
    "StableDiffusionInpaintPipelineLegacy": "StableDiffusionInpaintPipeline",
    **dict.fromkeys(
        (
            "CycleDiffusionPipeline",
            "LEditsPPPipelineStableDiffusion",
            "SemanticStableDiffusionPipeline",
            "StableDiffusionAttendAndExcitePipeline",
            "StableDiffusionDiffEditPipeline",
            "StableDiffusionModelEditingPipeline",
            "StableDiffusionPanoramaPipeline",
            "StableDiffusionParadigmsPipeline",
            "StableDiffusionPix2PixZeroPipeline",
            "StableDiffusionSAGPipeline",
        ),
        "StableDiffusionPipeline",
    ),
}
"""Other ways to sample the same networks: each with the class that it is read as, and saved as"""


OPTIONS = ("pag_applied_layers", "with_to_k", "with_augs")
"""Of those pipelines, in model_index.json"""


def kinds_of(path: Path) -> tuple[str, str]:
    """The class that a folder's model_index.json names, and the one that it is read as. Raises CheckpointError for an
    unsupported one."""
    given = brief(folder.read_json(path / "model_index.json").get("_class_name")).strip("'")
    named = given.removeprefix("Flax")
    kind = READ_AS.get(named, named)
    if kind not in SUPPORTED:
        raise CheckpointError(f"{path}: a {given} is not supported; supported: {', '.join(SUPPORTED)}")
    return named, kind


def class_with(kind: str, added: Mapping[str, str]) -> str:
    """The class of a pipeline with what one of the tables above adds, in place of what it has; {}: without.

    Some have none with: theirs is that of the pipeline without.
    """
    for classes in (WITH_CONTROLNET, WITH_UNION, WITH_ADAPTER):
        kind = {controlled: plain for plain, controlled in classes.items()}.get(kind, kind)
    return added.get(kind, kind)
