"""What all tests share: two threads, fixed seeds, and the real model where it has been fetched."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from manylora.models.demo_model import demo_model_path


def pytest_configure() -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For long runs of tiny operations, in which a second thread is waited for, not used."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    path = demo_model_path()
    if not path.is_file():
        pytest.skip(f"needs {path}: fetch it with `make model`")
    return path
