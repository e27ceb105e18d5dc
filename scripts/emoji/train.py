"""Trains the embedded model: drawings -> VAE -> latents -> text encoder -> UNet -> a diffusers folder.

    pip install "emoji>=2.15"
    npm pack @lobehub/fluent-emoji-3d
    python scripts/emoji/train.py prepare --package lobehub-fluent-emoji-3d-*.tgz
    python scripts/emoji/train.py all --out my-model

`prepare` makes drawings.npz, which is all that the rest needs. `vae`, `decoder`, `latents`, `text`, `unet`, `export`
and `curves` are the stages of `all`. Everything lies in --work; a run that was killed goes on from its last checkpoint
when the same command is given again. `begin --model FOLDER` lets training go on from a finished model instead: `vae`,
`text` and `unet`, given after it, start with its weights.
"""

import argparse
from pathlib import Path

import recipe
from autoencoder import train_decoder, train_vae
from curves import draw_curves
from latents import make_latents
from model import begin, export
from names import read_names
from prepare import prepare
from text_to_latents import train_text, train_unet

from sdjax import EMBEDDED_MODEL

NAMES = Path(__file__).with_name("names.txt")


def make_drawings(args: argparse.Namespace) -> None:
    """The raw package -> drawings.npz"""
    drawings, path = prepare(args.package, read_names(NAMES), recipe.SOURCE_SIZE), args.work / "drawings.npz"
    args.work.mkdir(parents=True, exist_ok=True)
    drawings.save(path)
    print(f"{len(drawings.names)} drawings, {path.stat().st_size / 1e6:.1f} MB")


def curves(args: argparse.Namespace) -> None:
    """The logs of all stages as one picture: curves.png"""
    draw_curves(sorted(args.work.glob("*.csv")), args.work / "curves.png")


ALL = {
    "vae": train_vae,
    "decoder": train_decoder,
    "latents": make_latents,
    "text": train_text,
    "unet": train_unet,
    "export": export,
    "curves": curves,
}
STAGES = {"prepare": make_drawings, "begin": begin, **ALL}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, default=Path("train_emoji"), help="folder of everything intermediate")
    parser.add_argument("--out", type=Path, default=EMBEDDED_MODEL, help="folder of the finished model")
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL, help="folder of a finished model, for `begin`")
    parser.add_argument("--package", type=Path, help="tarball of @lobehub/fluent-emoji-3d, for `prepare`")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the computation")
    for stage, steps in (("vae", 20000), ("decoder", 5000), ("text", 20000), ("unet", 20000)):
        parser.add_argument(f"--{stage}-steps", type=float, default=steps)
        parser.add_argument(f"--{stage}-minutes", type=float, default=float("inf"), help="if that is sooner")
    for model, batch, rate in (("vae", 32, 2e-3), ("text", 256, 1e-2), ("unet", 256, 1e-2)):
        parser.add_argument(f"--{model}-batch", type=int, default=batch)
        parser.add_argument(f"--{model}-rate", type=float, default=rate, help="learning rate")
    parser.add_argument("--measure-steps", type=int, default=1000, help="between two measures of the names recognised")
    args = parser.parse_args()
    for stage in ALL if args.stage == "all" else [args.stage]:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
