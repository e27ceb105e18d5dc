"""Arrays on the disk, by keys that are hashes of all that they were made of."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from sdjax.files import replacing

KEY_BYTES = 16


def default_folder() -> Path:
    """Where runs keep what they encode once: the user's cache."""
    return platformdirs.user_cache_path("sdjax", appauthor=False) / "training"


def key_of(*parts: Any) -> str:
    """32 hexadecimal digits of BLAKE2b of values that JSON has."""
    text = json.dumps(parts, allow_nan=False, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()


class Store:
    """A folder of files of arrays, each of which is there whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: str) -> Path:
        """The file of a key, in one of 256 folders."""
        return self.folder / key[:2] / f"{key}.npz"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def get(self, key: str) -> dict[str, np.ndarray]:
        """The arrays of a key. Raises OSError where there are none, or a damaged file, which is removed."""
        path = self.path(key)
        try:
            with open(path, "rb") as file, np.load(file) as arrays:
                return dict(arrays)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            path.unlink(missing_ok=True)
            raise OSError(f"{path}: damaged, and removed; the same command makes it again: {error}") from None

    def put(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps the arrays of a key."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:  # np.savez would add .npz to a bare name
            np.savez(file, **arrays)
