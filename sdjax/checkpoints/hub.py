"""From a folder or a Hub id to a local folder."""

import os
import re
from pathlib import Path

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
UNREAD = ("safety_checker/*",)
FILES = ("*.json", "*.txt", "*model.safetensors")


def resolve(path_or_id: str | os.PathLike, *, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The local folder of a checkpoint: a path that exists as it is, else a Hub id, downloaded or taken from its cache.

    Raises FileNotFoundError, saying what was looked for, when it is neither, or when the Hub does not have it, and
    NotADirectoryError for a file.
    """
    path = Path(path_or_id)
    if path.is_file():
        raise NotADirectoryError(f"{path_or_id}: a file, where a checkpoint folder is needed")
    if not path.is_dir():
        path = download(str(path_or_id), revision=revision, subfolder=subfolder)
    path = path / subfolder if subfolder else path
    if not path.is_dir():
        raise FileNotFoundError(f"{path_or_id}: has no folder {subfolder!r}")
    return path


def download(repo_id: str, *, revision: str | None, subfolder: str | None) -> Path:
    """The snapshot folder of a Hub repository, with the configs, tokenizer files and safetensors of its models."""
    if not HUB_ID.fullmatch(repo_id) or repo_id.startswith("."):
        raise FileNotFoundError(f"{repo_id}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [f"{subfolder}/{pattern}" for pattern in FILES] if subfolder else list(FILES)
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=UNREAD))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{repo_id}: no such folder, and the Hub did not give it: {reason}") from error
