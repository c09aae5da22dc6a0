"""Where a model is to run, found to be there before its weights are read."""

import torch

from manylora.errors import ConfigError


def usable_device(device: torch.device | str) -> torch.device:
    """Return the device, once a number has gone there and come back.

    Raises:
        ConfigError: no device of that name, or none that this torch and this machine have.
    """
    try:
        usable = torch.device(device)
        torch.zeros(1, device=usable).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # what torch raises, by the kind of device
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device '{device}' cannot be used; here torch has {there}: {reason}") from error
    return usable
