"""Textual inversion (arXiv:2208.01618): the vectors of a new word are trained, and nothing else."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.checkpoints.folder import write_arrays
from sdjax.checkpoints.textual_inversion import FILE_NAMES
from sdjax.diffusion_pipeline import WORDS
from sdjax.pipeline import StableDiffusionPipeline
from sdjax.runtime.network import Graph
from sdjax.training.trained import Trained, Tree, copied, described, needed, parameters

KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""What files for SDXL call the text encoders"""
TOKENS = "text_model.embeddings.token_embedding.weight"


def begin(
    pipe: StableDiffusionPipeline,
    token: str,
    initializer: str,
    *,
    vectors: int = 1,
    pictures_cached: bool = True,
    gradient_checkpointing: bool = False,
) -> Trained:
    """A word of so many vectors for each text encoder, which begin as those of the tokens of `initializer`, in turn.

    The tokenizers of the pipeline know the word from now on: captions have it. Raises ValueError for a word that is
    known already, for one without an initializer and where other words are loaded.
    """
    if pipe.learned:
        raise ValueError("the pipeline has learned words already: load them after training")
    tokenizers = pipe.text_tokenizers
    for tokenizer in tokenizers.values():
        tokenizer.check_new(token, vectors)
    ids = {name: tokenizer.encode(initializer) for name, tokenizer in tokenizers.items()}
    if not all(ids.values()):
        raise ValueError(f"initializer={initializer!r}: a word that says about what the new one means")
    graphs, frozen = {}, {}
    for name in needed(pipe, texts_cached=False, pictures_cached=pictures_cached):
        graphs[name] = Graph(copied(getattr(pipe, name), gradient_checkpointing=gradient_checkpointing))
        frozen[name] = parameters(getattr(pipe, name))
    tables = {name: np.asarray(frozen[name][TOKENS]).astype(np.float32) for name in tokenizers}
    rows = {name: tables[name][np.resize(own, vectors)] for name, own in ids.items()}
    for name, tokenizer in tokenizers.items():
        if len(tokenizer) != len(tables[name]):
            raise ValueError(f"{name} has {len(tables[name])} rows for the {len(tokenizer)} tokens of its tokenizer")
        tokenizer.add_token(token, vectors)
    pipe.learned.update(rows)
    save, install = partial(_save, token=token), partial(_install, pipe)
    return Trained(graphs, {WORDS: rows}, frozen, **described(pipe), save=save, install=install)


def _save(
    path: Path, tree: Tree, *, token: str, dtype: Any = np.float32, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes a file, or learned_embeds.safetensors in a folder: {token: [N D]}, or for SDXL its pair."""
    rows = {name: np.asarray(value).astype(dtype) for name, value in tree[WORDS].items()}
    named = {KEYS[name]: own for name, own in rows.items()} if len(rows) > 1 else {token: next(iter(rows.values()))}
    file = path if path.suffix == ".safetensors" else path / FILE_NAMES[0]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(file, named, {key: str(value) for key, value in {"token": token, **(metadata or {})}.items()})


def _install(pipe: StableDiffusionPipeline, tree: Tree) -> None:
    pipe.learned.update({name: np.asarray(value, np.float32) for name, value in tree[WORDS].items()})
