"""What `manylora bench first-token` does from its settings to its last line."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from manylora.bench.first_token.config import FirstTokenConfig
from manylora.bench.first_token.run import FirstTokenResult, Waits, run
from manylora.bench.progress import progress_lines
from manylora.bench.records import folder_for, keep_and_print
from manylora.bench.settings import settings_digest


def bench_first_token(config: FirstTokenConfig) -> None:
    """Measure, print what came of it (unless `json`), keep the record, and print it as the last line.

    Raises:
        ConfigError: the machine is busy; or the record shall be kept and there is no repository to keep it in.
    """
    folder = folder_for(config)
    result = run(config, progress_lines(Console(stderr=True)))
    if not config.json:
        for line in lines_of(result):
            print(line)
    keep_and_print(result, None if folder is None else record_file(result, folder))


def record_file(result: FirstTokenResult, folder: Path) -> Path:
    """Where a record is kept: one of equal settings a day and machine, the newest."""
    kind = f"first-token-{result.config.dtype}-{settings_digest(result.config)}"
    return folder / f"{result.started[:10]}_{result.machine.slug}_{kind}.json"


def lines_of(result: FirstTokenResult) -> list[str]:
    config = result.config
    return [
        f"{config.samples} adapters of rank {config.rank} ({result.adapter_bytes / 1e6:.1f} MB), {config.dtype}, "
        f"{config.num_threads} threads; {result.adapter_loads} loads, {result.adapter_evictions} evictions",
        f"first token, adapter never read:   {_waits(result.cold)}",
        f"first token, adapter in the pool:  {_waits(result.warm)}",
        f"cold over warm: {result.p50_ratio:.2f} at p50, {result.p99_ratio:.2f} at p99",
        *(["The machine was busy: these figures mean little."] if result.forced else []),
    ]


def _waits(waits: Waits) -> str:
    figures = (waits.p50_s, waits.p90_s, waits.p99_s, waits.max_s)
    return "p50 {:.1f}, p90 {:.1f}, p99 {:.1f}, most {:.1f} ms".format(*(1000 * s for s in figures))
