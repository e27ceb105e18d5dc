"""PyTorch's pipelines, one of each kind, and their folders."""

import shutil
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
from original_pipelines import Single, original_pipeline
from references import FAMILIES, Reference, refer


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    made: dict[str, Reference] = {}

    def reference(kind: str) -> Reference:
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
def singles(tmp_path_factory) -> Callable[[str], Single]:
    made: dict[str, Single] = {}

    def single(kind: str) -> Single:
        if kind not in made:
            made[kind] = original_pipeline(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return single
