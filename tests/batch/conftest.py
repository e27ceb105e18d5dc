"""A job's output, made by one process that nothing disturbs."""

from pathlib import Path

import pytest
from processes_of_a_job import begin, ended


@pytest.fixture(scope="session")
def undisturbed(one_level_folder, tmp_path_factory) -> Path:
    """The output of `processes_of_a_job.JOB`. Read only."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    assert ended(begin(one_level_folder, folder, "--quiet")) == [(0, "")]
    return folder
