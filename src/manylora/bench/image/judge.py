"""The judge: a small classifier, trained on real pictures only and frozen before anything that it judges exists.

Its scores over names say whether a picture shows its prompt, those over looks which style it has, and its last features
are the space in which sets of pictures are compared. How one is trained is no business of this file: it owns the
network, its folder and its hash.

    judge.json          names, looks, size, what it was trained on, accuracy on held-out pictures
    judge.safetensors   its weights
"""

# Shapes: B pictures [B, 3, H, W] in [-1, 1], H and W multiples of 16; D features, K names, S looks.

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from manylora.errors import ModelError
from manylora.training.aside import directory_aside

BATCH = 64


@dataclass(frozen=True)
class JudgeSize:
    """Channels after each halving of the side; the default has 0.95M parameters."""

    channels: tuple[int, ...] = (32, 64, 96, 160)


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(inner)))


class JudgeNet(nn.Module):
    """Convolutions to features, and a linear score of every name and every look."""

    def __init__(self, num_names: int, num_looks: int, size: JudgeSize = JudgeSize()) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for before, after in zip((3, *size.channels), size.channels, strict=False):
            halving = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            stages += [halving, nn.BatchNorm2d(after), nn.ReLU()]
            if before != 3:  # at half the side a residual pair would cost as much as all the rest
                stages.append(Residual(after))
        self.trunk = nn.Sequential(*stages)
        self.names = nn.Linear(size.channels[-1], num_names)
        self.looks = nn.Linear(size.channels[-1], num_looks)

    def features(self, pixels: Tensor) -> Tensor:
        """Return [B, D] of pictures [B, 3, H, W]: the mean over places of the last channels."""
        pooled: Tensor = self.trunk(pixels).mean(dim=(2, 3))
        return pooled

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores of names [B, K] and of looks [B, S], as logits of a softmax."""
        features = self.features(pixels)
        return self.names(features), self.looks(features)


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a judge says of some pictures."""

    features: NDArray[np.float32]  # [B, D]
    names: NDArray[np.float32]  # [B, K]  scores
    looks: NDArray[np.float32]  # [B, S]  probabilities

    @staticmethod
    def cat(parts: Sequence[Verdict]) -> Verdict:
        columns = ([getattr(part, field) for part in parts] for field in ("features", "names", "looks"))
        return Verdict(*(np.concatenate(column) for column in columns))


@dataclass(frozen=True, eq=False)
class Judge:
    """A frozen network and what its outputs stand for."""

    net: JudgeNet
    names: tuple[str, ...]
    looks: tuple[str, ...]
    about: Mapping[str, Any]
    """What it was trained on and how well it does on held-out pictures."""
    sha256: str
    """Of its weights and names; says which judge a figure is from."""

    @torch.no_grad()
    def verdict(self, pixels: Tensor) -> Verdict:
        """Judge pictures [B, 3, H, W] in [-1, 1]; what a decoder put beyond is clipped, as it is in a file."""
        parts = []
        for part in torch.split(pixels.clamp(-1, 1), BATCH):
            features = self.net.features(part)
            looks = self.net.looks(features).softmax(dim=1)
            parts.append(Verdict(features.numpy(), self.net.names(features).numpy(), looks.numpy()))
        return Verdict.cat(parts)

    def subjects(self, names: Sequence[str]) -> tuple[int, ...]:
        """Return the numbers of names.

        Raises:
            ModelError: a name that it does not know.
        """
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise ModelError(f"the judge knows {len(self.names)} names, and none of {unknown}")
        return tuple(self.names.index(name) for name in names)


def save_judge(
    folder: Path,
    net: JudgeNet,
    size: JudgeSize,
    names: Sequence[str],
    looks: Sequence[str],
    about: Mapping[str, Any],
) -> Judge:
    """Write a judge and return it as it will be read; the folder appears whole or not at all."""
    with directory_aside(folder) as aside:
        tensors = {name: tensor.detach().contiguous() for name, tensor in net.state_dict().items()}
        save_file(tensors, aside / "judge.safetensors")
        told = {"names": list(names), "looks": list(looks), "size": asdict(size), "about": dict(about)}
        (aside / "judge.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    return load_judge(folder)


def load_judge(folder: Path, expected_sha256: str | None = None) -> Judge:
    """Read a judge and freeze it.

    Args:
        expected_sha256: refuse another one: figures of two judges cannot be compared.
    Raises:
        ModelError: there is none, it cannot be read, or it is not the one expected.
    """
    try:
        told = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
        size = JudgeSize(tuple(told["size"]["channels"]))
        net = JudgeNet(len(told["names"]), len(told["looks"]), size).eval().requires_grad_(False)
        net.load_state_dict(load_file(folder / "judge.safetensors"))
    except FileNotFoundError as error:
        raise ModelError(
            f"no judge at {folder}: {error.filename} is missing. Train it: python -m icons.judge, in examples/"
        ) from None
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the judge at {folder} cannot be read: {error}") from error
    sha256 = _sha256(net, told["names"], told["looks"])
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise ModelError(
            f"the judge at {folder} is {sha256[:12]}, expected {expected_sha256[:12]}: figures of two judges cannot be "
            "compared. Measure all rows again with this one, or bring the other back"
        )
    return Judge(net, tuple(told["names"]), tuple(told["looks"]), told["about"], sha256)


def _sha256(net: JudgeNet, names: Sequence[str], looks: Sequence[str]) -> str:
    """Of what decides a verdict; not of the files, whose headers may differ from one library version to the next."""
    digest = hashlib.sha256(json.dumps([list(names), list(looks)]).encode())
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
