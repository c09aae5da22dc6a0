"""From what became of each request to the figures of a run."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from manylora.bench.serve.job import MISSED, Outcome, Report

INPUT_PRICE = 1
OUTPUT_PRICE = 2
"""Service of a token, as the virtual token counter (Sheng et al. 2024) prices it."""


@dataclass(frozen=True)
class Latency:
    """Mean and percentiles, in seconds, of the requests that have the figure; None where none has."""

    mean_s: float | None
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    p95_interval_s: tuple[float, float] | None = None
    """95 % confidence, from the values that stand about that place in order; None of too few."""

    @classmethod
    def of(cls, seconds: Iterable[float | None]) -> Latency:
        values = [value for value in seconds if value is not None]
        if not values:
            return cls(None, None, None, None)
        p50, p95, p99 = map(float, np.percentile(values, (50, 95, 99)))
        return cls(float(np.mean(values)), p50, p95, p99, p95_interval(values))


@dataclass(frozen=True, kw_only=True)
class TenantFigures:
    """One tenant of a run."""

    tenant: int
    requests: int
    attainment: float
    ttft: Latency
    service: float
    """While the load lasted: prompt tokens, and output tokens twice."""


@dataclass(frozen=True, kw_only=True)
class ServeFigures:
    """One run: a trace against a server."""

    requests: int
    finished: int
    """To the last token that was asked for."""

    refused_429: int
    """The queue was full."""

    refused_503: int
    """The deadline could not be kept."""

    cut_off: int
    """Without a token when the measurement ended, long after their time."""

    failed: int
    """All others."""

    wall_s: float
    requests_per_s: float
    """Finished ones over the whole time, as S-LoRA counts throughput."""

    tokens_per_s: float
    """Output tokens of finished requests, likewise."""

    ttft: Latency
    """From the planned time of sending to the first token, of the requests that got one."""

    tpot: Latency
    """Time per output token after the first."""

    attainment: float
    """Share of all requests that finished and whose first token came within the SLO."""

    attainment_interval: tuple[float, float]
    """95 % confidence, were requests drawn anew (Wilson 1927)."""

    satisfaction: float
    """Mean of 1 - (first-token latency / SLO)^2, 0 for the others: S-LoRA's reward."""

    fairness_adapters: float | None
    """Jain's index over adapters (see `fairness`); None where there is one at most."""

    fairness_tenants: float | None
    tenants: tuple[TenantFigures, ...]
    errors: dict[str, int]
    """What failed requests said, the most frequent first, and how often."""

    generator_us_per_token: float | None
    """Processor time that the load generator took for a token."""

    generator_cores: float
    late_p99_s: float
    """By how much the generator sent later than planned."""


def figures_of(report: Report, slo_s: float) -> ServeFigures:
    """Return the figures of an open-loop run with at least one request."""
    outcomes = report.outcomes
    done = [outcome for outcome in outcomes if outcome.finished]
    refused = {status: sum(o.status == status for o in outcomes) for status in (429, 503)}
    cut_off = sum(outcome.error == MISSED for outcome in outcomes)
    in_time = sum(_attains(outcome, slo_s) for outcome in outcomes)
    # What comes in the last moments cannot be served while the load lasts, however fair the server.
    until_s = max(outcome.planned_s for outcome in outcomes)
    settled = [outcome for outcome in outcomes if outcome.planned_s <= until_s - slo_s]
    return ServeFigures(
        requests=len(outcomes),
        finished=len(done),
        refused_429=refused[429],
        refused_503=refused[503],
        cut_off=cut_off,
        failed=len(outcomes) - len(done) - sum(refused.values()) - cut_off,
        wall_s=report.wall_s,
        requests_per_s=len(done) / report.wall_s,
        tokens_per_s=sum(outcome.num_tokens for outcome in done) / report.wall_s,
        ttft=Latency.of(outcome.ttft_s for outcome in outcomes),
        tpot=Latency.of(outcome.tpot_s for outcome in outcomes),
        attainment=in_time / len(outcomes),
        attainment_interval=share_interval(in_time, len(outcomes)),
        satisfaction=float(np.mean([_reward(outcome, slo_s) for outcome in outcomes])),
        fairness_adapters=fairness(settled, lambda outcome: outcome.adapter, until_s),
        fairness_tenants=fairness(settled, lambda outcome: outcome.tenant, until_s),
        tenants=_tenants(outcomes, slo_s, until_s),
        errors=_errors(outcomes),
        generator_us_per_token=report.cpu_us_per_token,
        generator_cores=report.cpu_s / report.wall_s,
        late_p99_s=float(np.percentile([outcome.sent_s - outcome.planned_s for outcome in outcomes], 99)),
    )


def attainment(outcomes: Sequence[Outcome], slo_s: float) -> float:
    """Share of the requests that finished and whose first token came within `slo_s`; of no request, 0."""
    return sum(_attains(outcome, slo_s) for outcome in outcomes) / max(len(outcomes), 1)


def share_interval(num: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence of a share, `num` of `of`; narrow where all or none are, never beyond 0 and 1.

    Source:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    share = num / of
    middle = (share + z**2 / (2 * of)) / (1 + z**2 / of)
    half = z / (1 + z**2 / of) * math.sqrt(share * (1 - share) / of + z**2 / (4 * of**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def p95_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence of the 95th percentile, whatever the distribution: two of the values. None of too few.

    How many of n values lie above the percentile is binomial; so it lies between those values, counted from the
    greatest, that are at this count's 2.5 and 97.5 % points.
    """
    n = len(values)
    at_most = np.cumsum([_binomial(n, above, 0.05) for above in range(n // 4)])
    fewest = int(np.searchsorted(at_most, 0.025, side="right")) - 1  # with so few above at most: 2.5 %
    most = int(np.searchsorted(at_most, 0.975))
    if fewest < 0:  # not even the greatest value is surely beyond it
        return None
    ordered = sorted(values)
    return ordered[n - most - 1], ordered[n - fewest - 1]


def _binomial(n: int, k: int, share: float) -> float:
    """Chance of k in n; by logarithms, since the factors are beyond what a float can hold."""
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(share) + (n - k) * math.log1p(-share))


def capacity(outcomes: Sequence[Outcome], begin_s: float, end_s: float, mean_output_tokens: float) -> float:
    """Requests a second that a closed loop got served between two times, by the output tokens that came."""
    tokens = sum(outcome.tokens_by(end_s) - outcome.tokens_by(begin_s) for outcome in outcomes)
    return tokens / (end_s - begin_s) / mean_output_tokens


def fairness(
    outcomes: Sequence[Outcome], who: Callable[[Outcome], int | None], until_s: float
) -> float | None:
    """Jain's index of service received over service due, by `who`; 1 if all got the same share of their due.

    Due is the max-min fair share of all the service that was given: nobody more than was asked for, and what the
    small ones leave is divided among the large. One that sends ten times as much is not due ten times as much.

    Source:
        Jain, Chiu and Hawe 1984.
    """
    asked: defaultdict[int | None, float] = defaultdict(float)
    given: defaultdict[int | None, float] = defaultdict(float)
    for outcome in outcomes:
        asked[who(outcome)] += INPUT_PRICE * outcome.prompt_tokens + OUTPUT_PRICE * outcome.asked_tokens
        given[who(outcome)] += _service(outcome, until_s)
    total = sum(given.values())
    if len(asked) < 2 or total == 0:
        return None
    due = max_min_shares(list(asked.values()), total)
    return jain_index([given[name] / share for name, share in zip(asked, due, strict=True)])


def jain_index(shares: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2): 1 if all are equal, 1/n if one has everything."""
    x = np.asarray(shares)
    return float(x.sum() ** 2 / (len(x) * (x**2).sum()))


def max_min_shares(demands: Sequence[float], total: float) -> list[float]:
    """Divide `total`: equal parts, but nobody more than demanded, what is left over going to the others."""
    shares = [0.0] * len(demands)
    left = total
    order = sorted(range(len(demands)), key=demands.__getitem__)
    for num_served, i in enumerate(order):
        shares[i] = min(demands[i], left / (len(demands) - num_served))
        left -= shares[i]
    return shares


def _attains(outcome: Outcome, slo_s: float) -> bool:
    return outcome.finished and outcome.ttft_s is not None and outcome.ttft_s < slo_s


def _reward(outcome: Outcome, slo_s: float) -> float:
    if outcome.ttft_s is None or not _attains(outcome, slo_s):
        return 0.0
    return 1.0 - (outcome.ttft_s / slo_s) ** 2


def _service(outcome: Outcome, until_s: float) -> float:
    tokens = outcome.tokens_by(until_s)
    return OUTPUT_PRICE * tokens + (INPUT_PRICE * outcome.prompt_tokens if tokens else 0)


def _tenants(outcomes: Sequence[Outcome], slo_s: float, until_s: float) -> tuple[TenantFigures, ...]:
    by_tenant: defaultdict[int, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_tenant[outcome.tenant].append(outcome)
    return tuple(
        TenantFigures(
            tenant=tenant,
            requests=len(own),
            attainment=attainment(own, slo_s),
            ttft=Latency.of(outcome.ttft_s for outcome in own),
            service=sum(_service(outcome, until_s) for outcome in own),
        )
        for tenant, own in sorted(by_tenant.items())
    )


def _errors(outcomes: Sequence[Outcome], most: int = 5) -> dict[str, int]:
    counts: defaultdict[str, int] = defaultdict(int)
    for outcome in outcomes:
        if not outcome.finished:
            # Messages that differ in a number alone are one.
            counts[f"{outcome.status}: " + re.sub(r"\d+(\.\d+)?", "N", outcome.error or "")] += 1
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:most])
