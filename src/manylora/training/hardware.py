"""Where a run computes and in what precision, through accelerate; and what ran it, for the record."""

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

import torch

from manylora.errors import ConfigError
from manylora.version import __version__

if TYPE_CHECKING:
    from accelerate import Accelerator

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["bf16", "fp32"]


def make_accelerator(device: Device, precision: Precision) -> "Accelerator":
    """Return an accelerator of one process.

    Raises:
        ConfigError: no CUDA device where one was asked for, or several processes.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no CUDA device; use device='cpu' or 'auto'")
    # accelerate keeps device and precision for the whole process and refuses a second run that differs.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if precision == "bf16" else "no")
    if accelerator.num_processes != 1:
        raise ConfigError(f"training runs in one process, but was launched in {accelerator.num_processes}")
    return accelerator


def describe_environment(device: torch.device) -> dict[str, str | int]:
    """Versions and hardware that a run's bits depend on."""
    packages = ("transformers", "peft", "accelerate")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "manylora": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,  # names the build as well, which its package's version may not
        **{package: version(package) for package in packages},
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
    }
