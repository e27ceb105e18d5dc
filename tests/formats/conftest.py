"""PyTorch's pipelines, one of each kind, and their folders. Imported without PyTorch too, so it is not at the top."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    import oracle
    from references import FAMILIES, refer

    made = {}

    def reference(kind: str):
        if kind not in made:
            made[kind] = refer(oracle.pipeline(tmp_path_factory.mktemp(kind), FAMILIES[kind]), kind)
        return made[kind]

    return reference


@pytest.fixture(scope="session")
def folders(references, tmp_path_factory) -> Callable[[str], Path]:
    """The folder that PyTorch saves of a family. Read only."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("folder")
            references(kind).pipe.save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.fixture
def copied(folders, tmp_path) -> Callable[[str], Path]:
    return lambda kind: shutil.copytree(folders(kind), tmp_path / "copied")


@pytest.fixture(scope="session")
def singles(tmp_path_factory) -> Callable:
    from original_pipelines import original_pipeline

    made = {}

    def single(kind: str):
        if kind not in made:
            made[kind] = original_pipeline(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return single
