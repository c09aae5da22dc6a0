"""Which pictures of a batch can run: an adapter that cannot be had fails its own pictures alone."""

import errno
import os
from pathlib import Path

import pytest

from manylora.errors import AdapterUnavailableError
from manylora.image.engine import ImageEngine
from manylora.image.params import ImageParams
from manylora.lora.convert import save_adapter
from manylora.lora.library import Library
from manylora.models.diffusion_base import DiffusionBase
from tests.image.pictures import largest_difference, random_adapter


def test_an_adapter_that_cannot_be_read_fails_its_own_picture_alone(
    sd: DiffusionBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("lcm", "private"), 1):
        save_adapter(random_adapter(sd, seed), tmp_path / f"{name}.safetensors", "diffusers")
    opened = Path.open

    def refuse(path: Path, *args: object, **kwargs: object) -> object:
        if path.stem == "private":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return opened(path, *args, **kwargs)  # type: ignore[call-overload]  # whatever it was called with

    with ImageEngine(sd, Library(tmp_path)) as engine:
        (wanted,) = engine.generate(["a cat"], ImageParams(seed=1), ["lcm"])
        monkeypatch.setattr(Path, "open", refuse)
        good, bad = engine.generate(["a cat"] * 2, ImageParams(seed=1), ["lcm", "private"])
    assert isinstance(bad.error, AdapterUnavailableError)
    assert "private.safetensors' cannot be read: Permission denied" in str(bad.error)
    assert largest_difference(good, wanted) <= 1
