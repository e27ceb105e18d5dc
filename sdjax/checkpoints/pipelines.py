"""The pipeline classes of PyTorch diffusers that model_index.json may name, with or without the prefix Flax."""

from collections.abc import Collection
from pathlib import Path

from sdjax.checkpoints import folder
from sdjax.checkpoints.errors import CheckpointError
from sdjax.fields import brief

WITH_CONTROLNET = {
    "StableDiffusionPipeline": "StableDiffusionControlNetPipeline",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLImg2ImgPipeline": "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLControlNetInpaintPipeline",
}
"""The class of a pipeline without, and with ControlNets"""
WITH_ADAPTER = {
    "StableDiffusionPipeline": "StableDiffusionAdapterPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLAdapterPipeline",
}
"""The class of a pipeline without, and with T2I-Adapters"""

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


def kind_with(kind: str, components: Collection[str]) -> str:
    """The class of a pipeline with ControlNets, else with T2I-Adapters, else without. Some have none with."""
    for classes in (WITH_CONTROLNET, WITH_ADAPTER):
        kind = {controlled: plain for plain, controlled in classes.items()}.get(kind, kind)
    classes = WITH_CONTROLNET if "controlnet" in components else WITH_ADAPTER if "adapter" in components else {}
    return classes.get(kind, kind)
