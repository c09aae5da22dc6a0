"""Adapters in one file, in a library: by name without suffix, beside folders; links and replacements as of folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from manylora import Library
from manylora.errors import AdapterFormatError, AdapterNotFoundError
from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.convert import DIFFUSERS_FILE, save_adapter
from manylora.lora.sources import Found, LocalSource
from tests.lora.peft_files import TENSOR_FILE, write_adapter

SITE = "down_blocks.0.attentions.0.proj_in"


def adapter(seed: int, rank: int = 2) -> Adapter:
    a, b = torch.randn(rank, 4, generator=torch.manual_seed(seed)), torch.ones(6, rank)
    return Adapter({SITE: LoraPair(a, b, 0.5)})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    save_adapter(adapter(1), root / "style.safetensors", "kohya")
    save_adapter(adapter(2), root / "team" / "other.safetensors", "diffusers")
    save_adapter(adapter(3), root / "lcm", "diffusers")
    write_adapter(root / "alice", 4)
    return root


def test_files_are_listed_and_loaded_beside_folders(root: Path) -> None:
    library = Library(root)
    assert library.names() == ["alice", "lcm", "style", "team/other"]
    for name, seed in {"style": 1, "team/other": 2, "lcm": 3}.items():
        loaded = library.load(name)
        assert (loaded.identity, loaded.name) == (adapter(seed).identity, name)
        assert library.identity(library.locate(name)) == loaded.identity
    assert library.load("alice").sites


def test_listing_and_locating_open_no_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(root)
    monkeypatch.setattr("builtins.open", None)
    monkeypatch.setattr(Path, "open", None)
    monkeypatch.setattr(Path, "read_bytes", None)
    size = (root / "style.safetensors").stat().st_size
    assert len(library) == 4
    assert library.locate("style").num_bytes == size
    with pytest.raises(TypeError):
        library.load("style")


def test_what_lies_in_an_adapters_folder_is_no_adapter(root: Path) -> None:
    save_adapter(adapter(5), root / "alice" / "optimizer.safetensors", "kohya")
    save_adapter(adapter(5), root / "lcm" / "before.safetensors", "kohya")
    save_adapter(adapter(5), root / "no-config" / TENSOR_FILE, "kohya")
    save_adapter(adapter(5), root / ".hidden.safetensors", "kohya")
    (root / "folder.safetensors").mkdir()
    library = Library(root)
    assert library.names() == ["alice", "lcm", "style", "team/other"]
    for name in (
        "alice/optimizer",
        "alice/adapter_model",
        "lcm/before",
        "lcm/pytorch_lora_weights",
        "no-config/adapter_model",
        "style.safetensors",
    ):
        assert name not in library


def test_a_folder_comes_before_a_file_of_its_name(root: Path) -> None:
    save_adapter(adapter(5), root / "lcm.safetensors", "kohya")
    library = Library(root)
    assert library.names().count("lcm") == 1
    assert library.load("lcm").identity == adapter(3).identity
    (root / "lcm" / DIFFUSERS_FILE).unlink()
    assert library.load("lcm").identity == adapter(5).identity


def test_a_replaced_file_is_seen(root: Path) -> None:
    library = Library(root)
    ref = library.locate("style")
    save_adapter(adapter(6), root / "style.safetensors", "kohya")
    assert library.locate("style") != ref
    with pytest.raises(AdapterNotFoundError, match="locate it again"):
        library.load(ref)
    assert library.load("style").identity == adapter(6).identity


def test_links_within_the_root_are_followed_and_others_refused(root: Path, tmp_path: Path) -> None:
    save_adapter(adapter(7), tmp_path / "secret.safetensors", "kohya")
    save_adapter(adapter(7), tmp_path / "outside" / "secret.safetensors", "kohya")
    (root / "current.safetensors").symlink_to(root / "team" / "other.safetensors")
    (root / "leak.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (root / "linked").symlink_to(tmp_path / "outside")
    (root / "now").symlink_to(root / "lcm")
    library = Library(root)
    assert library.load("current").identity == adapter(2).identity
    assert library.load("now").identity == adapter(3).identity
    assert "now" in library.names()
    with pytest.raises(AdapterFormatError, match="link out of its root"):
        library.load("leak")
    with pytest.raises(AdapterNotFoundError, match="link out of its root"):
        library.load("linked/secret")


def test_a_path_is_a_name(root: Path) -> None:
    library = Library(root)
    library.add("by-file", root / "style.safetensors")
    library.add("by-folder", root / "lcm")
    library.add("by-its-file", root / "lcm" / DIFFUSERS_FILE)
    assert library.load("by-file").identity == adapter(1).identity
    assert library.load("by-folder").identity == library.load("by-its-file").identity == adapter(3).identity
    source = LocalSource(root)
    for name in ("style", "lcm", "team/other", "alice"):
        found = source.find(name)
        assert isinstance(found, Found)
        assert source.name_of(found.location) == name


def test_limits_hold_for_files(root: Path) -> None:
    assert Library(root, max_rank=2).load("style").sites
    with pytest.raises(AdapterFormatError, match="max_rank"):
        Library(root, max_rank=1).load("style")
    with pytest.raises(AdapterFormatError, match="max_bytes"):
        Library(root, max_bytes=10).load("style")


@pytest.mark.timeout(20)
def test_a_pipe_and_a_pickle_are_not_read(root: Path) -> None:
    os.mkfifo(root / "pipe.safetensors")
    (root / "pickle.pt").write_bytes(b"")
    library = Library(root)
    assert not {"pipe", "pickle"} & set(library.names())
    with pytest.raises(AdapterFormatError, match="not a regular file"):
        library.load("pipe")
    assert "pickle" not in library
