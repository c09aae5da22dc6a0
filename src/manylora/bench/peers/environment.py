"""Peers that run in a Python environment of their own: where it is, and what a process there needs to know.

Such a process runs this package's worker, of which it imports what needs numpy alone, and its own contender.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from manylora.bench.peers.table import PEERS
from manylora.errors import ConfigError

READY = "ready"
"""What its script writes last, into the environment's folder."""


def environment_folder(environment: str) -> Path:
    return Path.home() / ".cache" / "manylora" / "peers" / environment


def check_environments(peers: Iterable[str]) -> None:
    """Refuse peers whose environment nobody has made, or whose making was cut short.

    Raises:
        ConfigError: with the script to run.
    """
    for name in peers:
        environment = PEERS[name].environment
        if environment is not None and not (environment_folder(environment) / READY).is_file():
            raise ConfigError(
                f"peer '{name}' has no environment at {environment_folder(environment)}; "
                f"make it with benchmarks/peers/{environment.replace('-', '_')}.sh"
            )


def python_of(environment: str) -> str:
    return str(environment_folder(environment) / "bin" / "python")


def variables_of(environment: str, threads: int, packages: Path) -> dict[str, str]:
    """Variables of a process of this environment, beside those that every worker has.

    Args:
        packages: an empty folder, from which the process then imports this package and nothing else of ours.
    """
    (packages / "manylora").symlink_to(Path(__file__).parents[2], target_is_directory=True)
    own = {"PYTHONPATH": str(packages)}
    return own | _vllm_variables(threads) if environment == "vllm-cpu" else own


def _vllm_variables(threads: int) -> dict[str, str]:
    """As its documentation advises for a CPU: threads bound to cores, Intel's OpenMP before any other."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    preload = environment_folder("vllm-cpu") / "lib" / "libiomp5.so"
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": str(preload),
    }
