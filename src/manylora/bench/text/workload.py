"""What a benchmark asks for: seeded prompts, and which adapters each request names. Knows no engine and no clock.

Prompts are random tokens, so that no prefix cache can help anybody, and all requests are there from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, cast, get_args

import numpy as np

from manylora.errors import ConfigError

Kind = Literal["uniform", "power", "distinct", "identical"]


@dataclass(frozen=True)
class Distribution:
    """Which adapters requests name.

    uniform     every adapter is equally likely
    power:A     adapter int(n * u), u with density A * u^(A - 1): A = 1 is uniform, A towards 0 sends most requests to
                the first adapters
    distinct    request i names adapter i, and begins again where the adapters end
    identical   all requests name the first adapter

    Source:
        power: S-LoRA (Sheng et al. 2023), `generate_requests`; distinct, identical: Punica (Chen et al. 2023).
    """

    kind: Kind
    alpha: float = 1.0
    """Exponent of power; 1 for the others."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "uniform", "power:0.3", "distinct" or "identical".

        Raises:
            ConfigError: another word, or an exponent that is not above 0 and at most 1.
        """
        kind, colon, exponent = text.partition(":")
        if kind not in get_args(Kind) or (kind == "power") != bool(colon):
            raise ConfigError(
                f"unknown distribution '{text}'; known: uniform, power:A, distinct, identical"
            )
        try:
            alpha = float(exponent) if colon else 1.0
        except ValueError:
            alpha = 0.0
        if not 0.0 < alpha <= 1.0:
            raise ConfigError(
                f"the exponent of '{text}' must be above 0 and at most 1: power:1 is uniform, "
                "a smaller one sends more requests to fewer adapters"
            )
        return cls(cast(Kind, kind), alpha)

    def __str__(self) -> str:
        return f"power:{self.alpha:g}" if self.kind == "power" else self.kind

    def probabilities(self, num_adapters: int) -> np.ndarray:  # [num_adapters] float64
        """How likely a draw names each adapter; only of the random kinds."""
        edges = np.linspace(0.0, 1.0, num_adapters + 1) ** self.alpha
        return np.diff(edges)

    def draw(self, rng: np.random.Generator, request: int, num_adapters: int, num_named: int) -> list[int]:
        """The adapters that request number `request` names: `num_named` different ones."""
        if self.kind == "identical":
            return list(range(num_named))
        if self.kind == "distinct":
            return [(request * num_named + i) % num_adapters for i in range(num_named)]
        chosen = rng.choice(num_adapters, size=num_named, replace=False, p=self.probabilities(num_adapters))
        return [int(adapter) for adapter in chosen]


@dataclass(frozen=True)
class TraceRequest:
    """One request of a trace."""

    prompt: tuple[int, ...]
    """Token ids."""

    mixture: tuple[tuple[int, float], ...] = ()
    """(adapter, weight) of what it names; empty: the base."""


@dataclass(frozen=True)
class Trace:
    """Requests that all arrive at once, each to be answered with exactly `output_tokens` tokens."""

    requests: tuple[TraceRequest, ...]
    output_tokens: int

    @property
    def num_output_tokens(self) -> int:
        return len(self.requests) * self.output_tokens

    @property
    def adapters(self) -> list[int]:
        """Every adapter that some request names, ascending."""
        return sorted({adapter for request in self.requests for adapter, _ in request.mixture})

    def on_base(self) -> Trace:
        """The same prompts with no adapter."""
        return Trace(tuple(TraceRequest(request.prompt) for request in self.requests), self.output_tokens)

    def cut(self, *, max_requests: int | None = None, max_output_tokens: int | None = None) -> Trace:
        """The first requests, or shorter answers."""
        output_tokens = min(self.output_tokens, max_output_tokens or self.output_tokens)
        return Trace(self.requests[:max_requests], output_tokens)


def make_trace(
    *,
    num_requests: int,
    prompt_tokens: int,
    output_tokens: int,
    vocab_size: int,
    num_adapters: int,
    distribution: Distribution,
    num_named: int,
    seed: int,
) -> Trace:
    """Draw a trace; equal arguments give equal traces.

    Args:
        num_named: adapters that each request names. One: at weight 1. More: weights drawn from 0.25 to 1.
    Raises:
        ConfigError: a request would have to name more adapters than there are.
    """
    if num_adapters and num_named > num_adapters:
        raise ConfigError(f"mixtures of {num_named} cannot be drawn from {num_adapters} adapters")
    # Prompts have a generator of their own: another choice of adapters leaves them as they are.
    prompts = np.random.default_rng([seed, 0]).integers(vocab_size, size=(num_requests, prompt_tokens))
    rng = np.random.default_rng([seed, 1])
    requests = []
    for number, prompt in enumerate(prompts.tolist()):
        named = distribution.draw(rng, number, num_adapters, num_named) if num_adapters else []
        requests.append(TraceRequest(tuple(prompt), _with_weights(rng, named)))
    return Trace(tuple(requests), output_tokens)


def _with_weights(rng: np.random.Generator, named: Sequence[int]) -> tuple[tuple[int, float], ...]:
    if len(named) == 1:
        return ((named[0], 1.0),)
    return tuple((adapter, round(float(rng.uniform(0.25, 1.0)), 3)) for adapter in named)
