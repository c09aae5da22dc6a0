"""S-LoRA's workload: when requests arrive, what they name, how long they are. Knows no server and no clock.

Prompts are random tokens. S-LoRA sends "Hello " over and over, and equal beginnings are what prefix caches live on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from manylora.bench.serve.job import ServeRequest


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The arguments of S-LoRA's `generate_requests`."""

    rate: float
    """Requests a second."""

    duration_s: float
    """int(rate * duration_s) requests are drawn."""

    cv: float
    """Coefficient of variation of the times between arrivals, which are Gamma distributed; 1 is Poisson's process."""

    alpha: float
    """Adapter int(n * u), u with density alpha u^(alpha - 1): 1 is uniform, towards 0 most name the first adapters."""

    num_adapters: int
    """0: all requests go to the base."""

    prompt_range: tuple[int, int]
    """Least length of a prompt, and one more than the greatest; all between are equally likely."""

    output_range: tuple[int, int]
    vocab_size: int
    seed: int

    @property
    def mean_output_tokens(self) -> float:
        return (self.output_range[0] + self.output_range[1] - 1) / 2


def draw_requests(
    workload: Workload, *, num_tenants: int = 1, hog: float = 1.0
) -> tuple[ServeRequest, ...]:
    """Draw a trace; equal arguments give equal traces, on any machine.

    Args:
        num_tenants: each has a stream of its own, from a seed of its own; together they send `rate` a second.
        hog: tenant 0 sends so many times what each of the others sends.
    """
    share = workload.rate / (num_tenants - 1 + hog)
    drawn = [
        request
        for tenant in range(num_tenants)
        for request in _draw_tenant(workload, tenant, share * (hog if tenant == 0 else 1.0))
    ]
    return tuple(sorted(drawn, key=lambda request: request.at_s))


def without_tenant(requests: tuple[ServeRequest, ...], tenant: int) -> tuple[ServeRequest, ...]:
    """The same requests of all the others, at the same times."""
    return tuple(request for request in requests if request.tenant != tenant)


def _draw_tenant(workload: Workload, tenant: int, rate: float) -> list[ServeRequest]:
    """The draws of `generate_requests` in its order, from its generator: its traces to the bit, prompts aside.

    Source:
        S-LoRA (Sheng et al. 2023), benchmarks/trace.py.
    """
    count = int(rate * workload.duration_s)
    rng = np.random.RandomState(workload.seed + tenant)
    adapters = (rng.power(workload.alpha, count) * max(workload.num_adapters, 1)).astype(int)
    prompt_lens = rng.randint(*workload.prompt_range, count)
    output_lens = rng.randint(*workload.output_range, count)
    shape = 1.0 / workload.cv**2
    at_s = np.cumsum(rng.gamma(shape, workload.cv**2 / rate, count))
    # Prompts have a generator of their own, so that the draws above stay S-LoRA's.
    tokens = np.random.default_rng([workload.seed, tenant]).integers(
        workload.vocab_size, size=prompt_lens.sum()
    )
    prompts = np.split(tokens, np.cumsum(prompt_lens)[:-1])
    return [
        ServeRequest(
            at_s=float(at_s[i]),
            adapter=int(adapters[i]) if workload.num_adapters else None,
            prompt=tuple(prompts[i].tolist()),
            output_tokens=int(output_lens[i]),
            tenant=tenant,
        )
        for i in range(count)
    ]


def draw_many(workload: Workload, count: int) -> tuple[ServeRequest, ...]:
    """So many requests of this kind, whatever the rate: for the closed loop, which minds no times."""
    return draw_requests(replace(workload, rate=(count + 0.5) / workload.duration_s))
