"""What the networks that are not trained make of pictures and captions: computed once, and kept on the disk."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.checkpoints.digests import digest_of, model_parts, tokenizer_part
from sdjax.inputs.branches import reading
from sdjax.runtime import programs
from sdjax.runtime.network import Graph, Network, in_float32
from sdjax.text.encoding import Text
from sdjax.training.data import pixels
from sdjax.training.data.buckets import Crop
from sdjax.training.data.examples import Example
from sdjax.training.data.store import Store, key_of

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline

T = TypeVar("T")

MOMENTS, HIDDEN, POOLED = "moments", "hidden", "pooled"
TEXTS_AT_ONCE = 16

Report = Callable[[str, int, int], None]
"""(what is computed, how many are done, of how many)"""


class View(NamedTuple):
    """A picture as its bucket has it."""

    example: Example
    crop: Crop
    mirrored: bool

    def key(self, vae: str) -> str:
        """Of the moments that a VAE with this digest gives."""
        crop = [self.crop.size, self.crop.resized, self.crop.left, self.crop.top]
        return key_of("moments", vae, self.example.picture.sha256, crop, self.mirrored)

    def pixels(self) -> np.ndarray:
        """uint8 [H W 3]"""
        return pixels.cut(self.example.picture.rgb(), self.crop, mirrored=self.mirrored)


class Moments:
    """The moments of the posterior of a pipeline's VAE, float32 [h w 2C]: mean and log variance."""

    def __init__(self, pipe: "StableDiffusionPipeline", store: Store):
        self.store, self._pipe = store, pipe
        self.digest = digest_of(model_parts("vae", pipe.vae))

    def prepare(self, views: Sequence[View], report: Report = lambda *_: None) -> None:
        """Computes, in float32, those that are not there; a view that is killed in between is lost alone."""
        missing = {key: view for view in views if (key := view.key(self.digest)) not in self.store}
        if not missing:
            return
        network, mesh = Network(in_float32(self._pipe.vae), self._pipe.mesh), self._pipe.mesh
        done = 0
        for size, own in _grouped(missing.items(), lambda pair: pair[1].crop.size).items():
            count = mesh.size * max(1, programs.DECODED_PIXELS // (size[0] * size[1]))
            for some in chunks(own, min(count, len(own))):
                shown = pixels.normalized(np.stack([view.pixels() for _, view in some]))
                encoded = np.asarray(_moments(network.graph, network.params(), self._pipe.padded(shown)))
                for (key, _), moments in zip(some, encoded, strict=False):
                    self.store.put(key, {MOMENTS: moments})
                done += len(some)
                report("pictures encoded", done, len(missing))

    def get(self, view: View) -> np.ndarray:
        """Of a view that is prepared."""
        return self.store.get(view.key(self.digest))[MOMENTS]


@partial(jax.jit, static_argnums=0)
def _moments(vae: Graph, params: Any, pictures: jax.Array) -> jax.Array:
    posterior = vae.merge(params).encode(pictures)
    return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1).astype(jnp.float32)


class TextStates:
    """What a pipeline's UNet reads of captions: {"hidden": [L D]}, SDXL also {"pooled": [P]}, float32."""

    def __init__(self, pipe: "StableDiffusionPipeline", store: Store):
        self.store, self._pipe, self._reading = store, pipe, reading(pipe, None)
        own = [part for name in pipe.text_tokenizers for part in model_parts(name, getattr(pipe, name))]
        own += [tokenizer_part(name, tokenizer) for name, tokenizer in pipe.text_tokenizers.items()]
        self.digest = digest_of(own)

    def _key(self, caption: str) -> str:
        return key_of("text", self.digest, list(self._reading[:3]), caption)

    def prepare(self, captions: Iterable[str], report: Report = lambda *_: None) -> None:
        """Computes those that are not there."""
        missing = [caption for caption in dict.fromkeys(captions) if self._key(caption) not in self.store]
        done = 0
        for some in chunks(missing, TEXTS_AT_ONCE):
            condition = self._encoded([*some, *[some[-1]] * (TEXTS_AT_ONCE - len(some))])
            for place, caption in enumerate(some):
                arrays = {name: np.asarray(value[place], np.float32) for name, value in condition.items()}
                self.store.put(self._key(caption), arrays)
            done += len(some)
            report("captions encoded", done, len(missing))

    def _encoded(self, captions: Sequence[str]) -> dict[str, jax.Array]:
        pipe = self._pipe
        ids = [pipe.padded(tokenizer(captions)[:, None]) for tokenizer in pipe.text_tokenizers.values()]
        texts = [Text(own, jnp.ones_like(own, jnp.float32)) for own in ids]
        graphs, params = zip(*(pipe.network(name) for name in pipe.text_tokenizers), strict=True)
        added = [pipe.added_embeddings(name) for name in pipe.text_tokenizers]
        found = programs.encode(pipe.mesh, graphs, list(params), self._reading, texts, added, pipe.vocab_sizes)
        names = {HIDDEN: "encoder_hidden_states", POOLED: "text_embeds"}
        return {name: found[own] for name, own in names.items() if own in found}

    def get(self, caption: str) -> dict[str, np.ndarray]:
        """Of a caption that is prepared."""
        return self.store.get(self._key(caption))


def chunks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """So many values at a time."""
    for first in range(0, len(values), size):
        yield values[first : first + size]


def _grouped(values: Iterable[T], by: Callable[[T], Hashable]) -> dict[Any, list[T]]:
    groups: dict[Any, list[T]] = {}
    for value in values:
        groups.setdefault(by(value), []).append(value)
    return groups
