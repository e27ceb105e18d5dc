"""Which LoRAs are set while the requests of a group run."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusionPipeline


class LoraSets:
    """Sets the LoRAs of requests beside those that the pipeline had."""

    def __init__(self, pipe: "StableDiffusionPipeline"):
        self._pipe = pipe
        self._own = self._set

    @property
    def _set(self) -> dict[str, float]:
        """Those that are set now, with their weights."""
        return {} if self._pipe.loras is None else {k: v for k, v in self._pipe.loras.weights.items() if v}

    def use(self, loras: tuple[tuple[str, float], ...]) -> None:
        """Sets these (path, weight), of which new ones are loaded, and what the pipeline had."""
        if not loras and self._pipe.loras is None:
            return
        weights = {**self._own, **dict(loras)}
        known = {} if self._pipe.loras is None else self._pipe.loras.weights
        for path in weights.keys() - known.keys():
            self._pipe.load_lora(path, 0.0, name=path)
        if weights != self._set:
            self._pipe.set_loras(weights)

    def restore(self) -> None:
        """Sets what the pipeline had."""
        if self._pipe.loras is not None:
            self._pipe.set_loras(self._own)
