"""What is added to the networks of a pipeline: LoRAs, IP-Adapters, learned words."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sdjax import components
from sdjax.checkpoints import casting, hub, lora, textual_inversion
from sdjax.checkpoints.errors import CheckpointError
from sdjax.components import IP_ADAPTERS
from sdjax.models import CLIPVisionModelWithProjection, IPAdapter, StableUnCLIPImageNormalizer, UNet2DConditionModel
from sdjax.request import spread
from sdjax.runtime.loras import Loras
from sdjax.text.tokenizer import CLIPTokenizer

ADAPTED = ("unet", "text_encoder", "text_encoder_2")
FACE_LORAS = tuple(f"faceid_{i}" for i in range(len(IP_ADAPTERS)))
"""What the LoRA is called that an IP-Adapter of faces brings, as in PyTorch"""


class Adapters:
    """The part of a pipeline that loads these and forgets them again."""

    unet: UNet2DConditionModel
    image_encoder: CLIPVisionModelWithProjection | None
    image_normalizer: StableUnCLIPImageNormalizer | None
    text_tokenizers: dict[str, CLIPTokenizer]

    def __init__(self) -> None:
        self.loras: Loras | None = None
        """the LoRAs that are loaded; None if there are none"""
        self.learned: dict[str, np.ndarray] = {}
        """[N D] by text encoder: the vectors of loaded words"""
        for name in IP_ADAPTERS:
            setattr(self, name, None)

    def load_lora(
        self,
        path_or_hub_id: str | os.PathLike,
        weight: float = 1.0,
        name: str | None = None,
        *,
        revision: str | None = None,
    ) -> str:
        """Adds a LoRA (arXiv:2106.09685) to those that are set, with this weight, and returns its name.

        path_or_hub_id: a file, a folder or a Hub repository that holds one, of kohya's, PEFT's or diffusers' spelling.
        name: what `set_loras` calls it; None: that of the file, or of the repository.
        Raises CheckpointError, before anything is changed, for one that does not fit these models, ValueError for a
        name that is taken.
        """
        path = hub.resolve_file(path_or_hub_id, lora.FILE_NAMES, revision=revision)
        if path.name in lora.PEFT_FILE_NAMES and hub.is_id(path_or_hub_id):  # which is half of it
            hub.resolve_file(path_or_hub_id, (lora.ADAPTER_CONFIG,), revision=revision)
        name = name or components.stem(path_or_hub_id)
        loras = self.adapted_loras()
        loras.add(name, lora.read(path, loras.shapes, self.unet.config.to_dict()), weight)
        return name

    def set_loras(self, weights: Mapping[str, float]) -> None:
        """Gives loaded LoRAs these weights and all others, those of IP-Adapters of faces too, none. Compiles nothing.

        Raises ValueError for one that is not loaded.
        """
        self.adapted_loras().set(weights)

    def unload_loras(self) -> None:
        """Forgets all LoRAs; the weights are what they were, bit for bit."""
        if self.loras is not None:
            self.loras.clear()
            self.loras = None

    def adapted_loras(self) -> Loras:
        """The LoRAs of the models that this pipeline has now."""
        models = {name: getattr(self, name) for name in ADAPTED if getattr(self, name) is not None}
        if self.loras is None:
            self.loras = Loras(models)
        elif replaced := [name for name in models if self.loras.models.get(name) is not models[name]]:
            raise ValueError(
                f"{', '.join(replaced)}: replaced after LoRAs were loaded; call unload_loras, load them again"
            )
        return self.loras

    def load_ip_adapter(
        self,
        path_or_hub_id: str | os.PathLike | Sequence[str | os.PathLike],
        subfolder: str | Sequence[str] = "",
        weight_name: str | Sequence[str] = "",
        image_encoder_folder: str | None = "image_encoder",
        *,
        revision: str | None = None,
    ) -> None:
        """Loads an IP-Adapter (arXiv:2308.06721), or one for each value of lists, in place of those that are loaded.

        path_or_hub_id: a file, or a folder or Hub repository that has subfolder/weight_name. image_encoder_folder:
        where CLIP's image encoder is, beside the first file, or, with a slash in it, below the folder or repository;
        None: nowhere. It is loaded unless the pipeline has one; without it a call takes ip_adapter_image_embeds alone.
        One of faces (FaceID) needs none, and has a LoRA, which is set as "faceid_0".
        Raises CheckpointError, before anything is changed, for what does not fit the UNet or the image encoder.
        """
        given = {"path_or_hub_id": path_or_hub_id, "subfolder": subfolder, "weight_name": weight_name}
        places = _for_each(given)
        adapters, loras = [], {}
        for i, (path, folder, name) in enumerate(places):
            inside = [PurePosixPath(folder, name).as_posix()] if name else []
            file = hub.resolve_file(path, inside, revision=revision)
            adapter, loras[FACE_LORAS[i]] = IPAdapter.of_file(file, self.unet)
            adapters.append(adapter)
        encoder, kinds = self.image_encoder, {adapter.config.kind for adapter in adapters}
        if encoder is None and image_encoder_folder is not None and kinds != {"face"}:
            path, folder = hub.folder_of(*places[0][:2])
            near = PurePosixPath("" if "/" in image_encoder_folder else folder, image_encoder_folder).as_posix()
            options = {"revision": revision, "dtype": self.unet.conv_in.dtype}
            encoder = CLIPVisionModelWithProjection.from_pretrained(path, near, **options)
        for adapter in adapters if encoder is not None else ():
            adapter.check_encoder(encoder)
        self.image_encoder = encoder
        self._set_ip_adapters(adapters)
        for name, layers in loras.items():
            if layers:
                self.adapted_loras().add(name, layers, 1.0)

    def unload_ip_adapter(self) -> None:
        """Forgets all IP-Adapters, the LoRAs in them and, unless the UNet needs it, the image encoder."""
        self._set_ip_adapters(())
        if self.image_normalizer is None:
            self.image_encoder = None

    def _set_ip_adapters(self, adapters: Sequence[IPAdapter]) -> None:
        for i, name in enumerate(IP_ADAPTERS):
            if getattr(self, name) is not None and self.loras is not None:
                self.loras.remove(FACE_LORAS[i])
            setattr(self, name, adapters[i] if i < len(adapters) else None)
        if self.loras is not None and not self.loras.layers:
            self.unload_loras()

    def load_textual_inversion(
        self, path_or_hub_id: str | os.PathLike, token: str | None = None, *, revision: str | None = None
    ) -> str:
        """Teaches the text encoders a word (arXiv:2208.01618), for prompts and negative prompts, and returns it.

        path_or_hub_id: a file, a folder or a Hub repository that holds one. token: the word; None: the file's own,
        else its name. Raises CheckpointError where it does not fit the text encoders, ValueError for a word that is
        known already.
        """
        path = hub.resolve_file(path_or_hub_id, textual_inversion.FILE_NAMES, revision=revision)
        embedding = textual_inversion.read(path)
        token = token or embedding.token or components.stem(path_or_hub_id)
        fitting = self._fitting(embedding.vectors, path)
        for name, vectors in fitting.items():
            known, added = len(self.text_tokenizers[name]), len(self.learned.get(name, ()))
            rows = getattr(self, name).config.vocab_size + added
            if known != rows:
                raise ValueError(f"{name} has {rows} rows for the {known} tokens of its tokenizer: none can be added")
            self.text_tokenizers[name].check_new(token, len(vectors))
        for name, vectors in fitting.items():
            self.text_tokenizers[name].add_token(token, len(vectors))
            added = [self.learned[name]] if name in self.learned else []
            self.learned[name] = np.concatenate([*added, vectors])
        return token

    def _fitting(self, vectors: Mapping[str | None, np.ndarray], path: Path) -> dict[str, np.ndarray]:
        """The vectors by text encoder: that which the file names, or that of their width."""
        widths = {name: getattr(self, name).config.hidden_size for name in self.text_tokenizers}
        fitting = {
            name: rows
            for component, rows in vectors.items()
            for name, width in widths.items()
            if component in (None, name) and width == rows.shape[1]
        }
        if len(fitting) != len(vectors):
            found = ", ".join(f"{rows.shape[1]} for {name or 'a text encoder'}" for name, rows in vectors.items())
            known = ", ".join(f"{width} ({name})" for name, width in widths.items())
            raise CheckpointError(f"{path}: vectors of another width than this model's: {found}; here: {known}")
        for name, rows in fitting.items():
            dtype = getattr(self, name).text_model.embeddings.token_embedding.embedding.dtype
            if casting.cast(rows, dtype) is None:
                raise CheckpointError(f"{path}: its vectors for the {name} are too large for {dtype}")
        return fitting


def _for_each(given: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The values of each IP-Adapter: of a list, or one for all. Raises ValueError that begins with what is wrong."""
    listed = {name: value if isinstance(value, list | tuple) else [value] for name, value in given.items()}
    count = max(map(len, listed.values()))
    if count > len(IP_ADAPTERS):
        raise ValueError(f"{count} IP-Adapters; {len(IP_ADAPTERS)} at most")
    return list(zip(*(spread(name, own, [count], "IP-Adapters") for name, own in listed.items()), strict=True))
