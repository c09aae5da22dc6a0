"""S-LoRA's load under every policy. It takes 45 minutes on an idle machine, so kept records are read."""

from collections.abc import Iterator
from typing import Any

from points import Line, missing
from server_points.records import find, newest, said

SCRIPT, CURVE_SCRIPT = "serve_policies.sh", "serve_adapters.sh"
COMMAND = f"benchmarks/figures/{SCRIPT} --record"
CURVE_COMMAND = f"benchmarks/figures/{CURVE_SCRIPT} --record"
LOADS = (0.5, 1.0, 2.0)
POLICIES = ("fcfs", "cluster", "fair", "slo")
BESIDE = ("lifo", "abort")
MAX_ADAPTERS = 2000


def lines() -> Iterator[Line]:
    for num_adapters in (200, MAX_ADAPTERS):
        record = newest(SCRIPT, "policies", num_adapters)
        if record is None:
            yield missing(f"S-LoRA's load, {num_adapters} adapters", COMMAND)
        else:
            yield from _policies(record, num_adapters)
    curve = newest(CURVE_SCRIPT, "adapters", MAX_ADAPTERS)
    if curve is None:
        yield missing("from 0 to 2,000 adapters", CURVE_COMMAND)
    else:
        yield from _curve(curve)


def _policies(record: dict[str, Any], num_adapters: int) -> Iterator[Line]:
    yield Line(
        f"{num_adapters} adapters: {said(record)}",
        f"capacity {record['capacity_per_s']} requests/s",
        f"`{record['command']}`",
        True,
    )
    for load in LOADS:
        rows = {policy: find(record, policy=policy, load=load) for policy in (*POLICIES, *BESIDE)}
        shares = {policy: row["figures"]["attainment"] for policy, row in rows.items() if row is not None}
        in_time = ", ".join(f"{policy} {share:.1%}" for policy, share in shares.items())
        slo = rows["slo"]
        if slo is not None:
            low, high = slo["figures"]["attainment_interval"]
            in_time += f"; {slo['figures']['requests']} requests, slo within [{low:.1%}, {high:.1%}]"
        point = f"{num_adapters} adapters at {load:g}x: first token within 6 s"
        if len(shares) < len(rows):
            yield Line(point, in_time, "all six policies", False)
            continue
        least = max(shares[policy] for policy in BESIDE)
        yield Line(point, in_time, f"slo >= {least:.1%}", shares["slo"] >= least)


def _curve(record: dict[str, Any]) -> Iterator[Line]:
    rows = record["rows"]
    read = record["explained"]["adapter_bytes"] / (1e9 * record["explained"]["memory_read_gb_s"])
    first_s = rows[0]["engine"]["step_s"]
    for row in rows:
        engine, figures = row["engine"], row["figures"]
        distinct = engine["distinct_adapters_per_step"] or 0
        more_ms = 1e3 * (engine["step_s"] - first_s)
        yield Line(
            f"{row['run']['adapters']} adapters: {figures['requests_per_s']:.2f} requests/s, "
            f"step {1e3 * engine['step_s']:.0f} ms",
            f"{more_ms:+.0f} ms; reading {distinct:.0f} adapters takes {1e3 * read * distinct:.0f}",
            "reported as it is",
            True,
        )
    yield Line(f"the curve: {said(record)}", f"{len(rows)} rows", f"`{record['command']}`", len(rows) > 4)
