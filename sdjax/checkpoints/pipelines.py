"""The classes of PyTorch's pipelines, as a model_index.json names them."""

from collections.abc import Mapping

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

SUPPORTED = (
    *WITH_CONTROLNET,
    *WITH_CONTROLNET.values(),
    *WITH_UNION.values(),
    *WITH_ADAPTER.values(),
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
"""With or without the prefix Flax"""


def class_with(kind: str, added: Mapping[str, str]) -> str:
    """The class of a pipeline with what one of the tables above adds, in place of what it has; {}: without.

    Some have none with: theirs is that of the pipeline without.
    """
    for classes in (WITH_CONTROLNET, WITH_UNION, WITH_ADAPTER):
        kind = {controlled: plain for plain, controlled in classes.items()}.get(kind, kind)
    return added.get(kind, kind)
