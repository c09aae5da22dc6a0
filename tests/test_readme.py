"""The README's snippets run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.formats import save_peft

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_library_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    for seed, name in enumerate(("alice", "bob")):
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
        save_peft(Adapter({"0": LoraPair(a, b, 1.0)}, name=name), tmp_path / "adapters" / name)
    monkeypatch.chdir(tmp_path)
    x = torch.randn(3, 8)
    names: dict[str, Any] = {"model": model, "x": x}
    exec(SNIPPETS[0], names)
    with torch.inference_mode():
        base = model(x)
    y = names["y"]
    assert torch.equal(y[2], base[2])
    assert not torch.allclose(y[:2], base[:2])
    assert not torch.allclose(y[0], y[1])


@pytest.mark.model
@pytest.mark.usefixtures("smollm2_path")
def test_the_engine_snippet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(SNIPPETS[1], names)
    names["engine"].close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines if "Rome" in line or "{" in line]
    assert "None" in lines[-1]
    assert names["done"].error is None
