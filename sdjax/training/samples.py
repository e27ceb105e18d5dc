"""Pictures that a model in training makes now and then, always of the same prompts and seeds, and a sheet of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sdjax.files import replacing
from sdjax.pictures.grids import contact_sheet

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline

USUAL = {"num_inference_steps": 30}
"""How pictures are sampled, as in diffusers' example scripts"""
DISTILLED = {"scheduler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0}
"""How those of a model that is distilled"""
SHEET = "samples.png"


@dataclass(frozen=True)
class Samples:
    """What is drawn, and the folder: a picture step-prompt-seed.png of each, and the sheet of all, a row for each step.

    Attributes:
        seeds: 0 to this - 1, of each prompt.
        shown: what a ControlNet is shown, for each prompt; none: nothing.
        how: arguments of the pipeline's call.
    """

    folder: Path
    prompts: Sequence[str]
    seeds: int
    shown: Sequence[str] = ()
    how: Mapping[str, Any] = field(default_factory=lambda: USUAL)

    def draw(self, step: int, pipe: "StableDiffusionPipeline") -> Image.Image:
        """Draws and writes the pictures of a step, and the sheet anew, which it returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, prompt in enumerate(self.prompts):
            control = {"control_image": self.shown[number]} if self.shown else {}
            made = pipe(prompt, seed=range(self.seeds), num_images_per_prompt=self.seeds, **self.how, **control)
            for seed, image in enumerate(made.images):
                with replacing(self.folder / name(step, number, seed)) as temporary:
                    image.save(temporary, "png")
        return self.sheet()

    def sheet(self) -> Image.Image:
        """The sheet of all steps that are in the folder, written to it."""
        steps = sorted({int(path.name.split("-")[0]) for path in self.folder.glob("*-*-*.png")})
        pictures = [self._picture(step, *column) for step in steps for column in self._columns]
        heads = [self.prompts[number] if seed == 0 else f"seed {seed}" for number, seed in self._columns]
        sheet = contact_sheet(pictures, [f"step {step}" for step in steps], heads)
        with replacing(self.folder / SHEET) as temporary:
            sheet.save(temporary, "png")
        return sheet

    def has(self, step: int) -> bool:
        """Whether all pictures of a step are there."""
        return all((self.folder / name(step, *column)).is_file() for column in self._columns)

    def drop_after(self, step: int) -> None:
        """Removes the pictures of later steps."""
        for path in self.folder.glob("*-*-*.png"):
            if int(path.name.split("-")[0]) > step:
                path.unlink()

    @property
    def _columns(self) -> list[tuple[int, int]]:
        """(number of a prompt, seed) of each picture of a step."""
        return [(number, seed) for number in range(len(self.prompts)) for seed in range(self.seeds)]

    def _picture(self, *place: int) -> Image.Image | None:
        path = self.folder / name(*place)
        if not path.is_file():
            return None
        with Image.open(path) as image:
            return image.convert("RGB")


def name(step: int, prompt: int, seed: int) -> str:
    """The file of a picture."""
    return f"{step:06}-{prompt}-{seed}.png"
