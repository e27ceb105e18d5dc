"""From a path or a Hub id to a local folder, or to a local file."""

import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from sdjax.checkpoints.content import is_weight_name
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.file_names import FILES, choose, shards, variants
from sdjax.checkpoints.folder import read_json

HUB_ID = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")
HUB_FILE = re.compile(r"(?P<id>(?!\.)[\w.-]+/[\w.-]+)/(?P<name>.+)")
HUB_URL = re.compile(
    r"https://(?:huggingface\.co|hf\.co)/(?P<id>[\w.-]+/[\w.-]+)/(?:blob|resolve)/(?P<revision>[^/]+)/(?P<name>[^?#]+)"
)
INDEX = "model_index.json"
CONFIGS = (".json", ".txt")


def is_id(path_or_id: str | os.PathLike) -> bool:
    """Whether this can only be the id of a Hub repository: nothing here has this name."""
    return bool(HUB_ID.fullmatch(str(path_or_id))) and not Path(path_or_id).exists()


def resolve(
    path_or_id: str | os.PathLike,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    ignored: Collection[str] = (),
) -> Path:
    """The local folder of a checkpoint: a path that exists as it is, else a Hub id, downloaded or taken from its cache.

    Of a Hub repository come the configs and one weight file per model, see `needed`: of the components that its
    model_index.json lists, those in `ignored` left out; with `subfolder` of that one.
    Raises FileNotFoundError, naming the paths that were tried, when it is neither, or when the Hub does not have it,
    NotADirectoryError for a file, CheckpointError where the repository has weights as variants only.
    """
    path = _path(path_or_id)
    if path.is_file():
        raise NotADirectoryError(f"{path_or_id}: a file, where a checkpoint folder is needed")
    if not path.is_dir():
        path = _download(str(path_or_id), revision, subfolder, variant, ignored)
    path = path / subfolder if subfolder else path
    if not path.is_dir():
        raise FileNotFoundError(f"{path_or_id}: has no folder {subfolder!r}")
    return path


def resolve_file(path_or_id: str | os.PathLike, names: Sequence[str], *, revision: str | None = None) -> Path:
    """The local file of a path, of a folder or Hub repository that has one of `names`, or of a file on the Hub.

    A file on the Hub is `owner/repository/path/of/file` or its address, https://huggingface.co/….
    Raises FileNotFoundError, naming the paths that were tried.
    """
    path = _path(path_or_id)
    if path.is_file():
        return path
    if path.is_dir():
        if found := [path / name for name in names if (path / name).is_file()]:
            return found[0]
        raise FileNotFoundError(f"{path_or_id}: a folder, without {' or '.join(names) or 'a name of a file in it'}")
    given = str(path_or_id)
    if match := HUB_URL.fullmatch(given.split("?")[0]):
        return _download_file(match["id"], [unquote(match["name"])], unquote(match["revision"]), given)
    if "://" in given:
        raise FileNotFoundError(f"{given}: no address of a file on huggingface.co; download it, then give its path")
    if match := HUB_FILE.fullmatch(given):
        return _download_file(match["id"], [match["name"]], revision, given)
    if names and HUB_ID.fullmatch(given) and not is_weight_name(given):
        return _download_file(given, names, revision, given)
    raise FileNotFoundError(f"{given}: no such file")


def _path(path_or_id: str | os.PathLike) -> Path:
    """Raises FileNotFoundError for an empty text, which is no path: not the folder of the process."""
    if not os.fspath(path_or_id):
        raise FileNotFoundError("an empty text, where a path or a Hub id is needed")
    return Path(path_or_id)


def folder_of(path_or_id: str | os.PathLike, subfolder: str) -> tuple[str | os.PathLike, str]:
    """(folder or Hub id, folder in it): those that are given, or, for a file's path, those that it is in."""
    path, given = Path(path_or_id), str(path_or_id)
    if path.is_file():
        return path.parent, ""
    match = None if path.is_dir() else HUB_URL.fullmatch(given.split("?")[0]) or HUB_FILE.fullmatch(given)
    return (match["id"], PurePosixPath(match["name"]).parent.as_posix()) if match else (path_or_id, subfolder)


def needed(files: Iterable[str], folders: Iterable[str], variant: str | None = None) -> list[str]:
    """Of the files of a repository, what it takes to load the models in these folders ("." is the top one).

    That is every JSON and text file, and for each model the one weight file, or the one set of shards, that
    `weights.read_tensors` chooses. Raises CheckpointError for a model that has other variants only.
    """
    contents: dict[str, dict[str, str]] = {}
    for file in files:
        path = PurePosixPath(file)
        contents.setdefault(str(path.parent), {})[path.name] = file
    return [
        contents[folder][name] for folder in folders for name in _of_folder(folder, contents.get(folder, ()), variant)
    ]


def _of_folder(folder: str, names: Collection[str], variant: str | None) -> list[str]:
    chosen = [name for name in names if name.endswith(CONFIGS) and ".index." not in name]
    for stem in FILES:
        if weights := choose(names, stem, variant):
            chosen += [weights, *(shards(names, weights) if weights.endswith(".json") else ())]
        elif others := variants(names, stem):
            hint = " or ".join(f"variant={other!r}" for other in others)
            raise CheckpointError(f"{folder}: its weights are there as {hint} only")
    return chosen


def _download(
    repo_id: str, revision: str | None, subfolder: str | None, variant: str | None, ignored: Collection[str]
) -> Path:
    """The snapshot folder of a Hub repository: what is needed of it, or, with no connection, what the cache has."""
    if not HUB_ID.fullmatch(repo_id):
        raise FileNotFoundError(f"{repo_id}: no such folder")
    import huggingface_hub as hf
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        files = hf.HfApi().list_repo_files(repo_id, revision=revision)
        folders = [subfolder] if subfolder else ["."]
        if not subfolder and INDEX in files:
            index = read_json(Path(hf.hf_hub_download(repo_id, INDEX, revision=revision)))
            folders = [name for name, value in index.items() if isinstance(value, list) and name not in ignored]
        patterns = needed(files, folders, variant)
        return Path(hf.snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except CheckpointError as error:
        raise CheckpointError(f"{repo_id}: {error}") from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _not_given(repo_id, "folder", error) from error
    except Exception as error:  # no connection, of which there are many kinds
        try:
            return Path(hf.snapshot_download(repo_id, revision=revision, allow_patterns=INDEX, local_files_only=True))
        except Exception:
            raise _not_given(repo_id, "folder", error) from error


def _download_file(repo_id: str, names: Sequence[str], revision: str | None, given: str) -> Path:
    import huggingface_hub as hf
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    reasons = []
    for name in names:
        try:
            return Path(hf.hf_hub_download(repo_id, name, revision=revision))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
            reasons.append(error)
    what = "file" if given != repo_id else f"file, nor a repository with {' or '.join(names)}"
    raise _not_given(given, what, reasons[0]) from reasons[0]


def _not_given(given: str, what: str, error: Exception) -> FileNotFoundError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return FileNotFoundError(f"{given}: no such {what}, and the Hub did not give it: {reason}")
