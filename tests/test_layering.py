"""Imports point downward, siblings do not import each other, and importing manylora is light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import manylora

PACKAGE = Path(manylora.__file__).parent
LAYER = {
    "errors": 0,
    "version": 0,
    "kernels": 1,
    "lora": 1,
    "memory": 1,
    "lifecycle": 1,
    "json_lines": 1,
    "diffusion": 1,
    "models": 2,
    "training": 2,
    "train": 3,
    "distill": 3,
    "text": 3,
    "image": 3,
    "server": 4,
    "bench": 4,
    "cli": 5,
    "__init__": 6,
    "__main__": 6,
}


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to: its first folder, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(source: str, package: str) -> Iterator[str]:
    """The parts of manylora that a source imports, wherever the statement stands: in functions, under TYPE_CHECKING.

    Args:
        package: dotted package of the source, to resolve relative imports with.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            modules = [f"manylora.{alias.name}" for alias in node.names] if base == "manylora" else [base]
        else:
            continue
        for module in modules:
            root, *rest = module.split(".")
            if root == "manylora":
                # A bare `import manylora`, or a public name imported from it, is the front door: __init__.
                yield rest[0] if rest and rest[0] in LAYER else "__init__"


def test_every_import_is_found():
    source = """
from typing import TYPE_CHECKING
import manylora.cli
from manylora.memory.pages import PagePool
from manylora import errors, Library
from ..models import llama
from . import sampling
if TYPE_CHECKING:
    from manylora.server import app
def later():
    import manylora
"""
    found = set(imported_parts(source, "manylora.text"))
    assert found == {"cli", "memory", "errors", "__init__", "models", "text", "server"}


def test_imports_point_downward():
    seen = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        here = part_of(path)
        assert here in LAYER, f"{path}: {here} has no layer; give it one"
        package = ".".join(["manylora", *path.relative_to(PACKAGE).parts[:-1]])
        for there in imported_parts(path.read_text(), package):
            seen += there != here
            assert there == here or LAYER[there] < LAYER[here], f"{path}: {here} imports {there}"
    assert seen > 0


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after the statement."""
    script = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["manylora", "manylora.memory", "manylora.lifecycle"])
def test_importing_is_light(module):
    loaded = loaded_by(f"import {module}")
    assert "manylora" in loaded
    assert not loaded & {"torch", "transformers"}


def test_a_heavy_import_would_be_noticed():
    assert "numpy" in loaded_by("import manylora.memory")
