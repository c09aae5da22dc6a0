"""A tenant that sends ten times as much does not delay the others. It takes nine minutes: the kept record is read."""

from collections.abc import Iterator
from typing import Any

from points import Line, missing
from server_points.records import Row, find, newest, said

SCRIPT = "serve_fairness.sh"
COMMAND = f"benchmarks/figures/{SCRIPT} --record"
NUM_ADAPTERS = 200
BOUND = 2.0


def lines() -> Iterator[Line]:
    record = newest(SCRIPT, "tenants", NUM_ADAPTERS)
    if record is None:
        yield missing("a tenant that sends ten times as much", COMMAND)
        return
    ratios = {policy: _worst_ratio(record, policy) for policy in ("fcfs", "fair")}
    samples = sum(one["requests"] for one in row_of(record, "fair", False)["figures"]["tenants"][1:])
    yield Line(
        f"a hog under fcfs: {said(record)}",
        f"first-token p95 of the worst other tenant: {ratios['fcfs']:.2f}x",
        f"> {BOUND:g}x, or fairness shows nothing",
        ratios["fcfs"] > BOUND,
    )
    row = row_of(record, "fair", False)
    yield Line(
        "a hog under fair",
        f"{ratios['fair']:.2f}x, {samples} requests of the others; Jain's index "
        f"{row['figures']['fairness_tenants']:.3f}",
        f"<= {BOUND:g}x",
        ratios["fair"] <= BOUND,
    )


def _worst_ratio(record: dict[str, Any], policy: str) -> float:
    """First-token p95 with the hog over that without it, of the tenant that suffers most; infinite if one got none."""
    with_hog, without = (_p95_s(record, policy, without_hog) for without_hog in (False, True))
    return max((with_hog.get(tenant) or float("inf")) / alone for tenant, alone in without.items() if alone)


def row_of(record: dict[str, Any], policy: str, without_hog: bool) -> Row:
    row = find(record, policy=policy, without_hog=without_hog)
    assert row is not None, f"the record has no run of {policy}"
    return row


def _p95_s(record: dict[str, Any], policy: str, without_hog: bool) -> dict[int, float | None]:
    row = row_of(record, policy, without_hog)
    return {one["tenant"]: one["ttft"]["p95_s"] for one in row["figures"]["tenants"]}
