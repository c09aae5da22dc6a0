"""The settings of `manylora distill`."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from manylora.distill.objective import ObjectiveConfig
from manylora.distill.phased import PhasedConfig
from manylora.errors import ConfigError
from manylora.training.loop import LoopConfig

LCM_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""What the published LCM-LoRAs change: attention, feed-forward, and the convolutions, which matter."""

# Settings that say where things go or how often they are looked at: a continued run may change them.
_NOT_OF_THE_TRAJECTORY = {
    *("base", "data", "out", "out_dtype", "name", "runs_dir", "base_name", "checkpoint_every", "resume"),
    *("eval_every", "eval_rows", "sample_steps", "gradient_checkpointing"),
}
_OF_THE_CHOICE = {"objective", "phases", "teacher_steps"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    base: str
    """Model to accelerate: a diffusers folder or hub id of Stable Diffusion's or SDXL's layout."""

    data: Path
    """Captioned pictures: a folder with metadata.jsonl ({"file_name": .., "text": ..} a line), or a WebDataset."""

    out: Path
    """Folder that the LoRA is written to, as pytorch_lora_weights.safetensors (with `full`: a diffusers folder)."""

    objective: Literal["lcm", "phased"] = "lcm"
    """What the student learns. lcm: where the trajectory ends, used with the sampler lcm in any number of steps.
    phased: where its phase of the trajectory starts, used with the sampler ddim in as many steps as phases."""

    phases: int | None = None
    """Of the objective `phased`: phases, which is the number of steps that the LoRA is for. They divide
    num_solver_steps. None: 4."""

    teacher_steps: int | None = None
    """Of the objective `phased`: solver steps that the teacher walks before the student jumps the rest of the phase. 1
    is phased consistency, the place to begin. None: the whole phase, so that no error of the student enters the target:
    dearer, and better only after long training."""

    guidance: float = 8.5
    """Guidance scale at which the teacher is best; it is distilled into the student, which then runs without
    guidance. The papers' w is this less one: 8.5 is the w = 7.5 of the published LCM-LoRAs. Small models often want
    2 to 3."""

    max_guidance: float | None = None
    """Distil all guidance scales from `guidance` to this: a second adapter is written, <out>/guidance, and its weight
    in the mixture chooses the scale (see docs/distill.md). None: one fixed scale."""

    num_steps: int = 1000
    """Optimizer steps."""

    batch: int = 16
    """Pictures of one forward pass; the teacher sees twice as many rows."""

    accumulate: int = 1
    """Forward passes whose gradients make one optimizer step."""

    learning_rate: float = 1e-4
    """Peak learning rate, 1e-4 to 3e-4; small models bear 1e-3."""

    warmup_steps: int = 20
    """Steps over which the learning rate rises."""

    final_fraction: float = 0.1
    """Share of the peak learning rate at which its cosine ends."""

    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""

    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    rank: int = 64
    """Rank of the LoRA at every site; 64 for SD and SDXL, less for small models."""

    alpha: float | None = None
    """LoRA's numerator: scaling = alpha / rank. None: the rank."""

    targets: tuple[str, ...] = LCM_TARGETS
    """Modules that get a LoRA, by the ends of their names."""

    full: bool = False
    """Distil all weights of the UNet instead of a LoRA, for comparison: several times the memory (docs/distill.md)."""

    ema_decay: float | None = None
    """Decay of a moving average of what learns: it then gives the target, and is what is written. None: none, as for
    the published LCM-LoRAs."""

    num_solver_steps: int = 50
    """Steps of the teacher's DDIM solver that the student learns to jump over. Samplers expect 50 of an LCM-LoRA; with
    another number, give it to `generate` as --original-steps."""

    loss: Literal["huber", "l2"] = "huber"
    """Distance between the student's two ends of the trajectory: pseudo-Huber or squared."""

    huber_c: float = 0.001
    """Difference at which huber turns from square to linear."""

    size: int | None = None
    """Side of the pictures in pixels. None: what the model was trained on."""

    skip_empty: bool = False
    """Leave out pictures without a caption. Otherwise they stand for no prompt at all."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""

    precision: Literal["bf16", "fp32"] = "fp32"
    """Arithmetic of the networks. What learns, its optimizer and everything outside the networks are fp32 always."""

    out_dtype: Literal["bf16", "fp16", "fp32"] = "fp16"
    """Dtype of the file that is written."""

    eval_every: int = 200
    """Steps between looks: paired distance to the teacher's solver, and a grid of samples."""

    eval_rows: int = 16
    """Pictures of a look: captions of the data set, noise by the seed."""

    sample_steps: tuple[int, ...] = (1, 2, 4)
    """Steps of the samples in a grid, one column each; the teacher's solver stands first. The objective phased adds its
    phases."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""

    seed: int = 0
    """Seed of the initial LoRA, the order of the pictures, noise and timesteps."""

    name: str | None = None
    """Name of the run folder. None: the name of `out`."""

    runs_dir: Path = Path("~/.cache/manylora/runs")
    """Where run folders (latents, checkpoints, metrics, samples) are kept."""

    base_name: str | None = None
    """What the file gives as its base model. None: `base`."""

    checkpoint_every: int = 100
    """Optimizer steps between checkpoints."""

    resume: bool = True
    """Go on from the run folder's newest checkpoint. False: delete it and start afresh."""

    def __post_init__(self) -> None:
        for name in (
            "num_steps",
            "batch",
            "accumulate",
            "rank",
            "eval_every",
            "eval_rows",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("weight_decay", "final_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("warmup_steps", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigError(f"alpha must be positive and finite, got {self.alpha}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if not self.targets:
            raise ConfigError("targets must name modules of the UNet, for example to_q")
        if self.full and self.max_guidance is not None:
            raise ConfigError(
                "max_guidance writes a second adapter, so it does not go with full; distil one guidance scale"
            )
        if not self.sample_steps or not all(1 <= n <= self.num_solver_steps for n in self.sample_steps):
            raise ConfigError(
                f"sample_steps must each lie in [1, num_solver_steps = {self.num_solver_steps}], "
                f"got {self.sample_steps}"
            )
        if self.name is not None and (self.name in ("", "..") or Path(self.name).name != self.name):
            raise ConfigError(f"name must be the name of one folder, got {self.name!r}")
        for name, known in (
            ("objective", ("lcm", "phased")),
            ("loss", ("huber", "l2")),
            ("precision", ("bf16", "fp32")),
            ("out_dtype", ("bf16", "fp16", "fp32")),
            ("device", ("auto", "cpu", "cuda")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}")
        if self.objective == "lcm" and (self.phases, self.teacher_steps) != (None, None):
            raise ConfigError("phases and teacher_steps belong to the objective phased")
        self.objective_config  # noqa: B018  its own settings are checked where they are made

    @property
    def objective_config(self) -> ObjectiveConfig:
        """A PhasedConfig where the objective is phased."""
        shared: dict[str, Any] = {
            "guidance_scale": self.guidance,
            "max_guidance_scale": self.max_guidance,
            "num_solver_steps": self.num_solver_steps,
            "loss": self.loss,
            "huber_c": self.huber_c,
        }
        if self.objective == "lcm":
            return ObjectiveConfig(**shared)
        phases = 4 if self.phases is None else self.phases
        return PhasedConfig(**shared, phases=phases, teacher_steps=self.teacher_steps)

    @property
    def resolved_alpha(self) -> float:
        return float(self.rank) if self.alpha is None else self.alpha

    @property
    def run_folder(self) -> Path:
        return self.runs_dir.expanduser() / (self.name or self.out.name)

    @property
    def loop(self) -> LoopConfig:
        return LoopConfig(
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            warmup_steps=min(self.warmup_steps, self.num_steps - 1),
            final_fraction=self.final_fraction,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            checkpoint_every=self.checkpoint_every,
        )

    def as_json(self) -> dict[str, Any]:
        """Return all settings as JSON gives them back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: list(value)
            if isinstance(value, tuple)
            else str(value)
            if isinstance(value, Path)
            else value
            for name, value in values.items()
        }

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a run and its continuation must have in common."""
        # Nothing of the choice is said where it is lcm, so that a run begun before there was one goes on.
        left_out = _NOT_OF_THE_TRAJECTORY | (_OF_THE_CHOICE if self.objective == "lcm" else set())
        return {name: value for name, value in self.as_json().items() if name not in left_out}
