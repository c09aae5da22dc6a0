"""Where and on what a measurement was made, and whether anybody else was at work there."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from manylora.errors import ConfigError

MAX_FOREIGN_CORES = 0.15
"""Processor time of other processes, in cores, at which a machine counts as busy."""

MAX_SAMPLES = 20
"""Looks at a busy machine before it is refused: the kernel's workers write files back for seconds after a job."""

_INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "asimd",
    "sve",
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine and the software that a figure depends on. No name that would tell whose it is."""

    cpu: str
    cores: int
    instruction_sets: tuple[str, ...]
    memory_bytes: int
    system: str
    python: str
    torch: str
    transformers: str
    peft: str

    @property
    def slug(self) -> str:
        """Short enough for a file name: "2-core-amd-epyc-avx512"."""
        cpu = re.sub(r"\((r|tm)\)|\bcpu\b|@.*|processor|\d+-core", "", self.cpu.lower())
        sets = self.instruction_sets
        width = (
            "avx512"
            if "avx512f" in sets
            else next((name for name in ("avx2", "sve", "asimd") if name in sets), "")
        )
        return re.sub(r"[^a-z0-9]+", "-", f"{self.cores}-core-{cpu}-{width}").strip("-")


@dataclass(frozen=True)
class Revision:
    """The commit that is measured."""

    commit: str
    """Short hash; "v" and the version where there is no repository."""

    dirty: bool
    """The working tree differs from the commit, kept rows aside."""

    root: Path | None = None
    """The working tree; None where there is no repository."""


@dataclass(frozen=True)
class ForeignLoad:
    """Processor time that others took while we measured, in cores."""

    other_cores: float
    steal_cores: float
    """Taken by other guests of the same host."""


def describe_machine() -> Machine:
    cpu, flags = _cpu_model_and_flags()
    return Machine(
        cpu=cpu,
        cores=len(psutil.Process().cpu_affinity()),
        instruction_sets=tuple(name for name in _INSTRUCTION_SETS if name in flags),
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=version("transformers"),
        peft=version("peft"),
    )


def describe_revision() -> Revision:
    """The commit that this package's source lies in."""
    here = Path(__file__).parent
    try:
        root = Path(_git(here, "rev-parse", "--show-toplevel"))
        # An installed copy below some other project's repository is not measured by that project's commit.
        if not here.is_relative_to(root / "src" / "manylora"):
            raise FileNotFoundError(here)
        # Rows kept earlier are no change of what is measured.
        status = _git(here, "status", "--porcelain", "--", ":(top)", ":(top,exclude)benchmarks/records")
        return Revision(_git(here, "rev-parse", "--short", "HEAD"), bool(status), root)
    except (OSError, subprocess.CalledProcessError):
        return Revision("v" + version("manylora"), dirty=False)


def last_level_cache_bytes() -> int:
    """Bytes of the largest cache that a core of this machine sees; 32 MiB where the system does not say."""
    sizes = [
        file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


def check_memory(num_bytes: int, purpose: str, option: str) -> None:
    """Refuse a measurement that the machine's memory would not hold.

    Raises:
        ConfigError: less than `num_bytes` are available; names the purpose and the option that asks for less.
    """
    available = psutil.virtual_memory().available
    if num_bytes > available:
        raise ConfigError(
            f"{purpose} need {num_bytes / 1e9:.1f} GB of memory, but {available / 1e9:.1f} GB are available; "
            f"ask for less with {option}"
        )


def foreign_cores(sample_s: float = 1.0) -> dict[tuple[int, str], float]:
    """Watch for a while which other processes are at work: those that are neither this one nor its descendants.

    Returns:
        (pid, name) to the processor time it used, in cores. Processes of other containers are not seen.
    """
    before = _foreign_cpu_s()
    started = time.perf_counter()
    time.sleep(sample_s)
    after = _foreign_cpu_s()
    elapsed_s = time.perf_counter() - started
    # A process that began within the sample counts from its start.
    return {key: (cpu_s - before.get(key, 0.0)) / elapsed_s for key, cpu_s in after.items()}


def refuse_if_busy(
    *, sample_s: float = 1.0, max_cores: float = MAX_FOREIGN_CORES, max_samples: int = MAX_SAMPLES
) -> None:
    """Look whether anybody else is at work here; wait up to `max_samples * sample_s` for them to end.

    Raises:
        ConfigError: together they use more than `max_cores` in each sample; names the largest of the last.
    """
    for _ in range(max_samples):
        used = foreign_cores(sample_s)
        total = sum(used.values())
        if total <= max_cores:
            return
    largest = sorted(used.items(), key=lambda item: -item[1])[:3]
    names = ", ".join(f"{name} (pid {pid}): {cores:.2f}" for (pid, name), cores in largest)
    raise ConfigError(
        f"the machine is busy: other processes use {total:.2f} cores ({names}); a timing bears {max_cores} at most. "
        "Stop them or wait; --force measures all the same and marks the row"
    )


def check_idle(*, force: bool) -> bool:
    """Whether the machine is busy and the user, who forces it, measures all the same.

    Raises:
        ConfigError: it is busy, and nobody forces anything.
    """
    try:
        refuse_if_busy(max_samples=1 if force else MAX_SAMPLES)
    except ConfigError:
        if not force:
            raise
        return True
    return False


class LoadWatch:
    """Measures from its making to `stop` what others took of the machine; says nothing about single processes."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._busy_s, self._steal_s = _system_cpu_s()
        self._own_s = _own_cpu_s()

    def stop(self) -> ForeignLoad:
        """Children of ours must be the same as at the start: an ended one takes its processor time with it."""
        busy_s, steal_s = _system_cpu_s()
        elapsed_s = time.perf_counter() - self._start_s
        others_s = (busy_s - self._busy_s) - (_own_cpu_s() - self._own_s)
        return ForeignLoad(
            round(max(others_s, 0.0) / elapsed_s, 3), round((steal_s - self._steal_s) / elapsed_s, 3)
        )


def _foreign_cpu_s() -> dict[tuple[int, str], float]:
    ours = {process.pid for process in _family()}
    seconds: dict[tuple[int, str], float] = defaultdict(float)
    for process in psutil.process_iter():
        try:
            if process.pid not in ours:
                times = process.cpu_times()
                seconds[process.pid, process.name()] = times.user + times.system
        except psutil.Error:
            continue  # it ended while we looked
    return seconds


def _own_cpu_s() -> float:
    total = 0.0
    for process in _family():
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def _family() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def _system_cpu_s() -> tuple[float, float]:
    """(busy, stolen) seconds of all processors since the machine started."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq, times.steal


def _cpu_model_and_flags() -> tuple[str, set[str]]:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    model = fields.get("model name") or platform.machine()
    return model, set((fields.get("flags") or fields.get("Features") or "").split())


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()
