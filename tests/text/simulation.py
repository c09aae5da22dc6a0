"""Service in virtual time: the real scheduler and pool, S-LoRA's workload, and a formula in place of the model.

A step takes `fixed_s`, `token_s` for each of its tokens and `adapter_s` for each distinct adapter: the weights are read
once, each token is computed, each adapter is read once. The defaults are about those of a 135M model on two cores.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from math import inf

import numpy as np

from manylora.lifecycle import FinishReason
from manylora.lora.adapter import AdapterId
from manylora.lora.mixture import BASE
from manylora.memory.block_table import BlockTable
from manylora.memory.pages import PageId
from manylora.memory.unified import UnifiedMemory
from manylora.text.params import SamplingParams
from manylora.text.policy import Policy
from manylora.text.scheduler import Scheduler
from manylora.text.sequence import AdapterKey, Request, Sequence

SLO_S = 6.0
PAGE_TOKENS = 16
ADAPTER_PAGES = 4
_ANY = SamplingParams()


@dataclass(frozen=True)
class Job:
    """A request of a trace."""

    arrival_s: float
    num_prompt: int
    num_output: int
    adapter: str = ""
    """Empty: the base."""
    tenant: str = ""


@dataclass
class Outcome:
    """What became of a job."""

    job: Job
    first_token_s: float | None = None
    """After its arrival; None: it never came."""
    refused_s: float | None = None
    ended: bool = False

    def attains(self, slo_s: float = SLO_S) -> bool:
        return self.ended and self.first_token_s is not None and self.first_token_s < slo_s


def gamma_trace(
    *,
    rate: float,
    duration_s: float,
    seed: int,
    cv: float = 1.0,
    num_adapters: int = 20,
    lengths: tuple[int, int] = (8, 256),
    tenant: str = "",
) -> list[Job]:
    """Gamma arrivals at `rate` a second; lengths of prompt and output and the adapter uniform.

    Source:
        S-LoRA (Sheng et al. 2023), `generate_requests`.
    """
    rng = np.random.default_rng(seed)
    num_jobs = int(rate * duration_s)
    arrivals = np.cumsum(rng.gamma(1 / cv**2, cv**2 / rate, num_jobs))
    prompts, outputs = rng.integers(*lengths, (2, num_jobs))
    adapters = rng.integers(num_adapters, size=num_jobs)
    return [
        Job(float(at), int(prompt), int(output), f"adapter-{adapter}", tenant)
        for at, prompt, output, adapter in zip(arrivals, prompts, outputs, adapters, strict=True)
    ]


class TimedSupply:
    """Adapters that are read within `read_s`, `max_pending` at a time, and copied within a step."""

    def __init__(self, simulation: Simulation, read_s: float, max_pending: int) -> None:
        self._simulation = simulation
        self._read_s = read_s
        self._max_pending = max_pending
        self._read_at: dict[AdapterKey, float] = {}
        self._copying: list[AdapterId] = []

    def demand(self, key: AdapterKey) -> None:
        if self._cache.pages(str(key)) is None and len(self._read_at) < self._max_pending:
            self._read_at.setdefault(key, self._simulation.now + self._read_s)

    def prefer(self, requests: SequenceOf[Request]) -> None:
        for request in requests:
            for key, _ in request.adapters:
                self.demand(key)

    def lookup(self, key: AdapterKey) -> tuple[AdapterId, int] | None:
        if self._cache.pages(str(key)) is None:
            if self._read_at.get(key, inf) > self._simulation.now:
                return None
        return AdapterId(str(key)), ADAPTER_PAGES

    def place(self, identity: AdapterId, pages: list[PageId]) -> None:
        del self._read_at[identity]
        self._cache.insert(identity, pages)
        self._copying.append(identity)

    def load_s(self, request: Request) -> float:
        return 0.0 if all(self._cache.is_ready(str(key)) for key, _ in request.adapters) else self._read_s

    def finish_copies(self) -> None:
        for identity in self._copying:
            self._cache.mark_ready(identity)
        self._copying.clear()

    @property
    def _cache(self):
        return self._simulation.memory.adapters


class Simulation:
    """One engine under one policy."""

    def __init__(
        self,
        policy: Policy,
        *,
        num_pages: int = 900,
        max_batch_tokens: int = 256,
        max_num_seqs: int = 32,
        fixed_s: float = 0.04,
        token_s: float = 0.002,
        adapter_s: float = 0.001,
        read_s: float = 0.1,
        max_pending: int = 32,
    ) -> None:
        self.now = 0.0
        self.fixed_s, self.token_s, self.adapter_s = fixed_s, token_s, adapter_s
        self.memory = UnifiedMemory(num_pages, PAGE_TOKENS, prefix_caching=False)
        self.supply = TimedSupply(self, read_s, max_pending)
        self.scheduler = Scheduler(
            self.memory,
            self.supply,
            policy,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            clock=lambda: self.now,
        )

    def run(self, jobs: Iterable[Job], *, deadline_s: float | None = SLO_S) -> list[Outcome]:
        """Serve all jobs to their ends."""
        outcomes = [Outcome(job) for job in sorted(jobs, key=lambda job: job.arrival_s)]
        to_come = list(enumerate(outcomes))[::-1]
        live: dict[int, Sequence] = {}
        while to_come or live:
            while to_come and to_come[-1][1].job.arrival_s <= self.now:
                number, outcome = to_come.pop()
                live[number] = self._submit(number, outcome.job, deadline_s)
            scheduled = self.scheduler.schedule()
            self.supply.finish_copies()
            for sequence, _ in self.scheduler.take_rejected():
                number = sequence.request.arrival
                outcomes[number].refused_s = self.now - outcomes[number].job.arrival_s
                del live[number]
            if not scheduled:
                self.now += 0.01
                continue
            adapters = {key for s in scheduled for key, _ in s.sequence.request.adapters}
            num_tokens = sum(s.num_new for s in scheduled)
            seconds = self.fixed_s + self.token_s * num_tokens + self.adapter_s * len(adapters)
            self.now += seconds
            self.scheduler.stepped(scheduled, seconds)
            for s in scheduled:
                self._update(s, outcomes, live)
        self.scheduler.check_integrity()
        return outcomes

    def _submit(self, number: int, job: Job, deadline_s: float | None) -> Sequence:
        request = Request(
            request_id=str(number),
            arrival=number,
            prompt=(0,) * job.num_prompt,
            params=_ANY,
            max_tokens=job.num_output,
            mixture=BASE,
            adapters=((job.adapter, 1.0),) if job.adapter else (),
            tenant=job.tenant,
            submitted_at=job.arrival_s,
            deadline=None if deadline_s is None else job.arrival_s + deadline_s,
        )
        for key, _ in request.adapters:
            self.supply.demand(key)
        sequence = Sequence(request, 0, list(request.prompt), BlockTable(PAGE_TOKENS))
        self.scheduler.add(sequence)
        return sequence

    def _update(self, scheduled, outcomes: list[Outcome], live: dict[int, Sequence]) -> None:
        sequence, samples = scheduled.sequence, scheduled.samples
        number = sequence.request.arrival
        outcome = outcomes[number]
        self.scheduler.update(scheduled, 0 if samples else None)
        if samples and outcome.first_token_s is None:
            outcome.first_token_s = self.now - outcome.job.arrival_s
        if len(sequence.tokens) - sequence.num_prompt == sequence.request.max_tokens:
            self.scheduler.remove(sequence)
            sequence.lifecycle.finish(FinishReason.LENGTH)
            outcome.ended = True
            del live[number]


def capacity(jobs: SequenceOf[Job], policy: Policy, **settings) -> float:
    """Requests a second when all jobs are there from the start, first come, first served."""
    simulation = Simulation(policy, **settings)
    simulation.run(
        [Job(0.0, j.num_prompt, j.num_output, j.adapter, j.tenant) for j in jobs], deadline_s=None
    )
    return len(jobs) / simulation.now


def attainment(outcomes: SequenceOf[Outcome], slo_s: float = SLO_S) -> float:
    """Share of the jobs whose first token came in time; a refused one is a miss."""
    return sum(outcome.attains(slo_s) for outcome in outcomes) / len(outcomes)
