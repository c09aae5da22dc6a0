"""One thread: these tests are long runs of tiny operations, in which a second thread is waited for, not used."""

from pathlib import Path

import pytest

from manylora.models.tiny_diffusion import tiny_sd, tiny_sdxl

WRITE = {"sd": tiny_sd, "sdxl": tiny_sdxl}
OTHER = {"sd": "sdxl", "sdxl": "sd"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """All of these tests."""


@pytest.fixture(scope="session")
def base_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base of each layout that predicts v, so that its trajectories are tame though its weights are random."""
    root = tmp_path_factory.mktemp("bases")
    return {kind: write(root / kind, prediction="v_prediction") for kind, write in WRITE.items()}


@pytest.fixture(params=["sd", "sdxl"])
def base_folder(request: pytest.FixtureRequest, base_folders: dict[str, Path]) -> Path:
    return base_folders[request.param]


@pytest.fixture
def other_base_folder(base_folder: Path, base_folders: dict[str, Path]) -> Path:
    return base_folders[OTHER[base_folder.name]]
