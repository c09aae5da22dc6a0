"""Tiny bases, built once; and one thread: in long runs of tiny operations a second one is waited for, not used."""

from pathlib import Path

import pytest

from manylora.models.diffusion_base import DiffusionBase, load_diffusion_base
from manylora.models.tiny_diffusion import tiny_sd, tiny_sdxl


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """All of these tests."""


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A random network that predicts v draws something; one that predicts epsilon draws what overflows the range.
    return tiny_sd(tmp_path_factory.mktemp("base") / "sd", prediction="v_prediction")


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl(tmp_path_factory.mktemp("base") / "sdxl", prediction="v_prediction")


@pytest.fixture(scope="session")
def sd(sd_folder: Path) -> DiffusionBase:
    return load_diffusion_base(sd_folder)


@pytest.fixture(scope="session")
def sdxl(sdxl_folder: Path) -> DiffusionBase:
    return load_diffusion_base(sdxl_folder)
