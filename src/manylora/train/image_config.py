"""The settings of `manylora train image`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manylora.errors import ConfigError

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_REST = (
    *("proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj"),
    *("downsamplers.0.conv", "upsamplers.0.conv"),
)

TARGETS: Mapping[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention+ff": _ATTENTION + _FEED_FORWARD,
    "all": _ATTENTION + _FEED_FORWARD + _REST,
}
"""Modules of a UNet by the end of their names. `all` is what LCM-LoRAs adapt too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTrainConfig:
    model: str
    """Base model: a diffusers folder or hub id of Stable Diffusion's or SDXL's layout."""

    data: Path
    """Training pictures: a folder with metadata.jsonl ({"file_name": ..., "text": ...} a line), or a WebDataset: a tar
    file or a folder of them."""

    out: Path
    """Folder that the adapter is written to."""

    eval_data: Path | None = None
    """Held-out pictures, in either layout. Without it, `eval_fraction` of the training pictures is held out."""

    eval_fraction: float = 0.1
    """Share of the pictures held out where no `eval_data` is given."""

    max_eval_pictures: int = 256
    """Held-out pictures on which the loss is measured, at most."""

    size: int | None = None
    """Pixels of a training picture's side: the shorter side is scaled to it, the rest cropped. None: the base's own."""

    empty_captions: Literal["keep", "skip"] = "keep"
    """What happens to a picture without caption: it trains the base's unconditional side, or is left out."""

    rank: int = 8
    """Rank of the adapter at every site."""

    alpha: float | None = None
    """LoRA's numerator: scaling = alpha / rank. None: the rank."""

    targets: Literal["attention", "attention+ff", "all"] = "attention+ff"
    """Which modules of the UNet get an adapter: attention, its feed-forward layers too, or all with convolutions."""

    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rank-stabilised LoRA)."""

    dropout: float = 0.0
    """Dropout on the adapter's input."""

    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, which guidance compares with."""

    min_snr_gamma: float = 5.0
    """Weigh timesteps by min(SNR, gamma) / SNR, as if the loss were on the data. 0: all the same."""

    epochs: float = 10.0
    """Passes over the training pictures."""

    max_steps: int | None = None
    """Take this many optimizer steps, more or fewer than `epochs` would be."""

    learning_rate: float = 1e-3
    """Peak learning rate. 1e-4 is usual for models of Stable Diffusion's size, 1e-3 for small ones."""

    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises."""

    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""

    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    batch_rows: int = 16
    """Pictures of one forward pass."""

    accumulate: int = 1
    """Forward passes whose gradients make one optimizer step."""

    gradient_checkpointing: bool = False
    """Keep few activations and compute the others again: less memory, a third more time."""

    precision: Literal["bf16", "fp32"] = "fp32"
    """Arithmetic of the matrix products (bf16: autocast). Base, adapter, optimizer and loss are fp32 always."""

    out_format: Literal["peft", "diffusers"] = "diffusers"
    """Whose files are written: pytorch_lora_weights.safetensors, or adapter_model.safetensors with its config."""

    out_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Dtype of the adapter file."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""

    seed: int = 0
    """Seed of the initial adapter, the order of the pictures, noise, dropout and the split."""

    eval_every: int = 200
    """Optimizer steps between looks at the run: held-out loss and a grid of samples."""

    sample_prompts: Path | None = None
    """Text file with a prompt a line. None: captions of held-out pictures."""

    num_samples: int = 8
    """Prompts that are drawn, at most; 0 for no grids."""

    sample_steps: int = 20
    """Sampling steps (DDIM) of a sample."""

    sample_guidance: float = 3.0
    """Guidance scale of a sample; 1 is none."""

    name: str | None = None
    """Name of the run folder. None: the name of `out`."""

    runs_dir: Path = Path("~/.cache/manylora/runs")
    """Where run folders (latents, checkpoints, metrics, plot, samples) are kept."""

    base_name: str | None = None
    """What the adapter's file gives as its base model. None: `model`."""

    checkpoint_every: int = 100
    """Optimizer steps between checkpoints."""

    resume: bool = True
    """Go on from the run folder's newest checkpoint. False: delete it and start afresh."""

    def __post_init__(self) -> None:
        at_least_one = ("rank", "batch_rows", "accumulate", "checkpoint_every", "max_eval_pictures")
        for name in (*at_least_one, "eval_every", "sample_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("epochs", "learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("dropout", "caption_dropout", "warmup_fraction", "weight_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 < self.eval_fraction < 1:
            raise ConfigError(f"eval_fraction must lie in (0, 1), got {self.eval_fraction}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigError(f"alpha must be positive and finite, got {self.alpha}")
        if not 0 <= self.min_snr_gamma < math.inf:
            raise ConfigError(
                f"min_snr_gamma must be finite and at least 0 (all the same), got {self.min_snr_gamma}"
            )
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"max_steps must be at least 1, got {self.max_steps}")
        if self.size is not None and self.size < 8:
            raise ConfigError(f"size must be at least 8 pixels, got {self.size}")
        if self.num_samples < 0:
            raise ConfigError(f"num_samples must be at least 0, got {self.num_samples}")
        if not 1 <= self.sample_guidance < math.inf:
            raise ConfigError(
                f"sample_guidance must be finite and at least 1 (no guidance), got {self.sample_guidance}"
            )
        if self.name is not None and (self.name in ("", "..") or Path(self.name).name != self.name):
            raise ConfigError(f"name must be the name of one folder, got {self.name!r}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}")

    @property
    def resolved_alpha(self) -> float:
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def run_folder(self) -> Path:
        return self.runs_dir.expanduser() / (self.name or self.out.name)


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "targets": tuple(TARGETS),
    "empty_captions": ("keep", "skip"),
    "precision": ("bf16", "fp32"),
    "out_format": ("peft", "diffusers"),
    "out_dtype": ("fp16", "bf16", "fp32"),
    "device": ("auto", "cpu", "cuda"),
}
