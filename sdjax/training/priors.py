"""Pictures of the class of a DreamBooth's subject, made by the model before it is trained (arXiv:2208.12242)."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sdjax.files import replacing
from sdjax.pictures.finite import ADVICE
from sdjax.training.data import folders

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline

AT_ONCE = 8  # on each device


def make(
    pipe: "StableDiffusionPipeline",
    folder: Path,
    prompt: str,
    count: int,
    size: tuple[int, int],
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> None:
    """Makes pictures seed-00000.png, … of a prompt until the folder has `count`, whatever was there; size: (width,
    height). What is killed goes on where it was. A picture that is not finite is made of a later seed."""
    folder.mkdir(parents=True, exist_ok=True)
    seed = 0
    while missing := lacking(folder, count):
        seeds = []
        while len(seeds) < min(missing, AT_ONCE * pipe.mesh.size):
            if not _file(folder, seed).exists():
                seeds.append(seed)
            seed += 1
        made = pipe(prompt, seed=seeds, num_images_per_prompt=len(seeds), width=size[0], height=size[1])
        if all(made.not_finite):
            raise ValueError(f"class pictures: those of seeds {seeds[0]} to {seeds[-1]} are not finite; {ADVICE}")
        for own, image, is_wrong in zip(seeds, made.images, made.not_finite, strict=True):
            if not is_wrong:
                with replacing(_file(folder, own)) as temporary:
                    image.save(temporary, "png")
        report("class pictures made", count - lacking(folder, count), count)


def lacking(folder: Path, count: int) -> int:
    """How many pictures are to be made."""
    return max(0, count - _there(folder)) if folder.is_dir() else count


def _there(folder: Path) -> int:
    return sum(path.suffix.lower() in folders.PICTURES for path in folder.iterdir() if path.name[0] != ".")


def _file(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed:05}.png"
