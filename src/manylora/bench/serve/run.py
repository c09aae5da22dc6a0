"""`manylora bench serve`: how does a server stand up to S-LoRA's load, under which policy, with how many adapters?

The load is open: requests come at their times whether or not earlier ones are answered. Rates are shares of the
capacity, which a closed loop measures first, so that figures of unlike machines can be compared. Every run has a server
of its own, started for it, so that none finds what another left in the pool; with a url, all share the one there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch

from manylora.bench.adapters import adapter_name, write_adapters
from manylora.bench.ceilings import measure_ceilings
from manylora.bench.floor import adapter_bytes, layer_products
from manylora.bench.machine import check_idle, describe_machine, describe_revision
from manylora.bench.serve.config import BENCH_POLICIES, ServeBenchConfig
from manylora.bench.serve.generator import generate
from manylora.bench.serve.job import Job, Outcome, ServeRequest
from manylora.bench.serve.journal import Journal, Kept, Measurement
from manylora.bench.serve.metrics import MetricsWatch
from manylora.bench.serve.result import (
    Explained,
    ServeResult,
    ServeRow,
    ServeRun,
    command_line,
    settings_of,
)
from manylora.bench.serve.server import Server, running_server, started_server
from manylora.bench.serve.stats import capacity, figures_of
from manylora.bench.serve.workload import draw_many, draw_requests, without_tenant
from manylora.errors import ConfigError
from manylora.models.config import LlamaConfig
from manylora.models.loading import load_config
from manylora.models.sites import base_sites

CLOSED_REQUESTS = 1000
"""Distinct requests of the closed loop; then they come again."""

START_S, ANSWER_S = 8.0, 5.0
"""To tell how long it will take: about what the start and end of a server take, and the longest answer."""

Say = Callable[[str], None]
"""Told in a few words what begins now."""


@dataclass(frozen=True)
class Measured:
    """The result, and of each run what became of every request: too much to keep, but what plots are made of."""

    result: ServeResult
    outcomes: tuple[tuple[Outcome, ...], ...]


def measure(config: ServeBenchConfig, say: Say = lambda _: None) -> Measured:
    """Measure; what an interrupted measurement with equal settings left in `out` is not measured again.

    Raises:
        ConfigError: the machine is busy, unless `force`; the server at `url` lacks something; `out` has an unfinished
            measurement with other settings.
        RuntimeError: a server or the load generator died, or no token came; notes say what the server said.
    """
    machine = describe_machine()
    journal = Journal(config.out, Measurement(settings=settings_of(config), machine=machine.slug))
    say("looking whether the machine is idle")
    forced = check_idle(force=config.force)
    model = load_config(config.model)
    with _bench(config, model, journal, forced, say) as bench:
        per_s = bench.capacity_per_s() if config.loads else None
        runs = plan_runs(config, per_s)
        if len(journal):
            say(f"{len(journal)} of {len(runs)} runs are there from before")
        say(f"about {expected_s([run for run in runs if not journal.find(run)], config) / 60:.0f} minutes")
        kept = [bench.run(run) for run in runs]
    rows = tuple(one.row for one in kept)
    result = ServeResult(
        kind=config.kind,
        capacity_per_s=per_s,
        rows=rows,
        explained=_explain(config, model, say) if config.kind == "adapters" and not config.url else None,
        config=config,
        command=command_line(config),
        commit=max(rows, key=lambda row: row.started).commit,
        dirty=any(row.dirty for row in rows),
        started=min(row.started for row in rows),
        machine=machine,
        forced=any(row.forced for row in rows),
    )
    return Measured(result, tuple(one.outcomes for one in kept))


def expected_s(runs: Sequence[ServeRun], config: ServeBenchConfig) -> float:
    """About how long the runs take: to start a server, to send, and to work off what is left over at the end."""

    def leftover_s(run: ServeRun) -> float:
        most = config.duration_s * max((run.load or 1.0) - 1, 0.1)
        return most if config.drain_s is None else min(most, config.drain_s + ANSWER_S)

    return sum(START_S + config.duration_s + leftover_s(run) for run in runs)


def plan_runs(config: ServeBenchConfig, capacity_per_s: float | None) -> list[ServeRun]:
    """Return the runs, policy by policy.

    Args:
        capacity_per_s: requests a second; None: rates are given.
    """
    if capacity_per_s is None:
        rates: list[tuple[float | None, float]] = [(None, rate) for rate in config.rate]
    else:
        rates = [(load, load * capacity_per_s) for load in config.loads]
    return [
        ServeRun(policy=policy, adapters=adapters, load=load, rate=rate, without_hog=without_hog)
        for adapters in config.rows or (config.adapters,)
        for policy in config.policies or ("",)
        for load, rate in rates
        for without_hog in ((False, True) if config.tenants > 1 else (False,))
    ]


@dataclass(frozen=True)
class _Bench:
    """Runs traces against servers."""

    config: ServeBenchConfig
    vocab_size: int
    adapters_folder: Path
    journal: Journal
    forced: bool
    say: Say

    def run(self, run: ServeRun) -> Kept:
        """Measure a run, unless the journal has it."""
        if (kept := self.journal.find(run)) is not None:
            return kept
        requests = self._trace(run)
        self.say(
            f"{run.label}: {len(requests)} requests in {self.config.duration_s:.0f} s, {run.rate:.2f} a second"
        )
        started, revision = datetime.now(UTC).isoformat(timespec="seconds"), describe_revision()
        with self._server(run.policy) as server:
            watch = MetricsWatch(server.scrape) if server.tells_metrics else None
            with watch or nullcontext():
                report, others = generate(self._job(server, requests))
        figures = figures_of(report, self.config.slo_s)
        self.say(
            f"  {figures.finished} finished, {figures.requests_per_s:.2f} a second; {figures.attainment:.1%} in time"
        )
        row = ServeRow(
            run=run,
            figures=figures,
            engine=None if watch is None else watch.counts,
            others=others,
            started=started,
            commit=revision.commit,
            dirty=revision.dirty,
            forced=self.forced,
        )
        kept = Kept(row=row, outcomes=report.outcomes)
        self.journal.keep(kept)
        return kept

    def capacity_per_s(self) -> float:
        """Requests a second of a closed loop, under the first policy, with as many adapters as the first run."""
        if self.journal.capacity_per_s is not None:
            return self.journal.capacity_per_s
        config = self.config
        first = plan_runs(config, 1.0)[0]
        workload = config.workload(1.0, first.adapters, self.vocab_size)
        self.say(
            f"measuring the capacity with {config.concurrency} requests at a time, {config.capacity_s:.0f} s"
        )
        # The tenants' keys are all good for this; which one is used makes no difference to a single queue.
        requests = draw_many(workload, CLOSED_REQUESTS)
        with self._server(first.policy) as server:
            job = self._job(server, requests, concurrency=config.concurrency, closed_s=config.capacity_s)
            report, _ = generate(job)
            begin_s = config.capacity_s / 3
            found = capacity(report.outcomes, begin_s, config.capacity_s, workload.mean_output_tokens)
            if not found:
                said = next((outcome.error for outcome in report.outcomes), "nothing")
                raise RuntimeError(
                    f"no token came in {config.capacity_s:.0f} s; the first request said: {said}"
                )
        self.say(f"  {found:.2f} requests a second")
        self.journal.keep_capacity(found)
        return found

    def _trace(self, run: ServeRun) -> tuple[ServeRequest, ...]:
        config = self.config
        workload = config.workload(run.rate, run.adapters, self.vocab_size)
        hog = config.hog if config.tenants > 1 else 1.0
        requests = draw_requests(workload, num_tenants=config.tenants, hog=hog)
        requests = without_tenant(requests, 0) if run.without_hog else requests
        if not requests:
            raise ConfigError(
                f"{run.rate:.3g} requests a second for {config.duration_s:g} s are none; measure longer"
            )
        return requests

    def _job(
        self,
        server: Server,
        requests: tuple[ServeRequest, ...],
        *,
        concurrency: int | None = None,
        closed_s: float = 0.0,
    ) -> Job:
        return Job(
            url=server.url,
            base=server.base,
            adapters=server.adapters,
            keys=server.keys,
            requests=requests,
            timeout_s=self.config.timeout_s,
            concurrency=concurrency,
            closed_s=closed_s,
            drain_s=self.config.drain_s,
        )

    @contextmanager
    def _server(self, policy: str) -> Iterator[Server]:
        config = self.config
        if config.url:
            yield running_server(config.url, config.api_key, config.tenants, config.num_adapters)
            return
        names = [adapter_name(number) for number in range(config.num_adapters)]
        # Without a prefix cache: what it saved on requests that happen to be equal would be no speed.
        options = ["--no-prefix-caching"]
        if policy:
            options += ["--policy", BENCH_POLICIES.get(policy, policy)]
        if policy == "slo" or policy in BENCH_POLICIES:  # the others refuse deadlines
            options += ["--first-token-deadline-s", str(config.slo_s)]
        options += config.options
        with started_server(config.model, self.adapters_folder, names, config.tenants, options) as server:
            yield server


@contextmanager
def _bench(
    config: ServeBenchConfig, model: LlamaConfig, journal: Journal, forced: bool, say: Say
) -> Iterator[_Bench]:
    """With the adapters on disk, as long as it is measured."""
    with TemporaryDirectory(prefix="manylora-bench-") as temporary:
        folder = config.adapters_folder or Path(temporary)
        if not config.url:
            say(f"writing {config.num_adapters} adapters")
            _write_adapters(config, model, folder)
        yield _Bench(config, model.vocab_size, folder, journal, forced, say)


def _write_adapters(config: ServeBenchConfig, model: LlamaConfig, folder: Path) -> None:
    """Write the adapters that are not there yet.

    Raises:
        ConfigError: those that are there are of another model, other ranks or another seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "made_for.json"
    made_for = {"model": model.name, "ranks": list(config.rank), "seed": config.seed}
    there = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    if there is None and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} holds other things than random adapters; name another --adapters-folder"
        )
    if there not in (None, made_for):
        raise ConfigError(
            f"{folder} holds adapters made for {there}, this is {made_for}; remove it, or name another "
            "--adapters-folder"
        )
    note.write_text(json.dumps(made_for) + "\n", encoding="utf-8")
    # They are written in turn, each as a whole: where the last one is, all are.
    if config.num_adapters and not (folder / adapter_name(config.num_adapters - 1)).exists():
        write_adapters(folder, base_sites(model), config.num_adapters, config.rank, config.seed)


def _explain(config: ServeBenchConfig, model: LlamaConfig, say: Say) -> Explained:
    say("measuring how fast memory is read")
    ceilings = measure_ceilings(
        layer_products(model), model.num_layers, torch.float32, threads=torch.get_num_threads()
    )
    return Explained(
        memory_read_gb_s=ceilings.memory_read_gb_s,
        adapter_bytes=round(mean(adapter_bytes(model, rank) for rank in config.rank)),
    )
