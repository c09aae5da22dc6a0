"""The settings of `manylora train text`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manylora.errors import ConfigError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTrainConfig:
    model: str
    """Base model: a folder, a GGUF file, a hub id, or smollm2-135m-instruct."""

    data: Path
    """Training rows, JSONL: {"messages": [...]} or {"prompt": ..., "completion": ...} a line."""

    out: Path
    """Folder that the PEFT adapter is written to."""

    eval_data: Path | None = None
    """Held-out rows, JSONL. Without it, `eval_fraction` of the training rows is held out."""

    eval_fraction: float = 0.1
    """Share of the rows held out where no `eval_data` is given."""

    rank: int = 8
    """Rank of the adapter at every site."""

    alpha: float | None = None
    """LoRA's numerator: scaling = alpha / rank. None: twice the rank."""

    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Modules that get an adapter, by the last part of their names; or "all-linear" alone: all but the output head."""

    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rank-stabilised LoRA)."""

    dropout: float = 0.0
    """Dropout on the adapter's input."""

    epochs: float = 2.0
    """Passes over the training rows."""

    max_steps: int | None = None
    """Take this many optimizer steps, more or fewer than `epochs` would be."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises."""

    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""

    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    batch_rows: int = 8
    """Rows of one forward pass."""

    accumulate: int = 1
    """Forward passes whose gradients make one optimizer step."""

    max_tokens: int = 512
    """Longest row."""

    overlong: Literal["truncate", "drop"] = "truncate"
    """What happens to a longer row."""

    precision: Literal["bf16", "fp32"] = "fp32"
    """Arithmetic of the matrix products (bf16: autocast). Base, adapter, optimizer and loss are fp32 always."""

    out_dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of the adapter file."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""

    seed: int = 0
    """Seed of the initial adapter, the order of the rows, dropout and the split."""

    name: str | None = None
    """Name of the run folder. None: the name of `out`."""

    runs_dir: Path = Path("~/.cache/manylora/runs")
    """Where run folders (checkpoints, metrics, plot) are kept."""

    base_name: str | None = None
    """What the adapter's config gives as its base model. None: `model`."""

    checkpoint_every: int = 50
    """Optimizer steps between checkpoints."""

    resume: bool = True
    """Go on from the run folder's newest checkpoint. False: delete it and start afresh."""

    def __post_init__(self) -> None:
        for name in ("rank", "batch_rows", "accumulate", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("dropout", "warmup_fraction", "weight_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 < self.eval_fraction < 1:
            raise ConfigError(f"eval_fraction must lie in (0, 1), got {self.eval_fraction}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigError(f"alpha must be positive and finite, got {self.alpha}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps must be at least 1, got {self.max_steps}")
        if self.max_tokens < 2:
            raise ConfigError(
                f"max_tokens must be at least 2 (something given, something predicted), got {self.max_tokens}"
            )
        if not self.targets or (ALL_LINEAR in self.targets and len(self.targets) > 1):
            raise ConfigError(
                f"targets must name modules, for example q_proj, or be '{ALL_LINEAR}' alone; got {self.targets}"
            )
        if self.name is not None and (self.name in ("", "..") or Path(self.name).name != self.name):
            raise ConfigError(f"name must be the name of one folder, got {self.name!r}")
        for name, known in (("overlong", ("truncate", "drop")), ("precision", ("bf16", "fp32")),
                            ("out_dtype", ("bf16", "fp32")), ("device", ("auto", "cpu", "cuda"))):  # fmt: skip
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}")

    @property
    def resolved_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def run_folder(self) -> Path:
        return self.runs_dir.expanduser() / (self.name or self.out.name)
