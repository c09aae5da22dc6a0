"""What a decode step costs: what it reads, computes and visits, each at a rate fitted to measured steps.

A step's time is a sum: parts follow one another in every layer, and even where reading and computing overlap in one
product, the sum lies near what is measured (a product of few rows waits for its weights, one of many does not).

    layers      what is paid once a layer, whatever it does: calls, threads waiting for each other
    weights     bytes of the base, read once
    products    operations of the base
    rank rows   bytes of the step's distinct adapters, read once
    KV          bytes of every sequence's context, read once
    pages       places to go to: a sequence's pages in each layer, an adapter's run in each stack
    sequences   what is paid once a sequence: scheduling, sampling
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np

from manylora.bench.floor import DecoderCosts, adapter_bytes, layer_products
from manylora.bench.steps.config import Point
from manylora.models.config import LlamaConfig
from manylora.models.sites import Stack
from manylora.text.pool import page_tokens_of

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
KV_BYTES = {"float32": 4, "bfloat16": 2, "int8": 2}
"""Of one value."""


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What one step does, in bytes, operations and places."""

    layers: float
    weights: float
    products: float
    rank_rows: float
    kv: float
    pages: float
    sequences: float

    @classmethod
    def of(cls, model: LlamaConfig, point: Point, dtype: str, *, distinct: int | None = None) -> Self:
        """The work of a step in which `distinct` adapters meet; None: each sequence has its own."""
        costs = DecoderCosts(model, KV_BYTES[dtype])
        adapters = point.batch if distinct is None else distinct
        values = (
            model.num_layers * sum(out * fan_in for out, fan_in in layer_products(model))
            + model.vocab_size * model.hidden_size
        )
        context_pages = -(-point.context // page_tokens_of(model, KV_BYTES[dtype]))
        return cls(
            layers=model.num_layers,
            weights=values * WEIGHT_BYTES[dtype],
            products=point.batch * 2 * values,
            rank_rows=adapters * adapter_bytes(model, point.rank),
            kv=point.batch * point.context * costs.kv_bytes_per_token,
            pages=model.num_layers * (point.batch * context_pages + adapters * len(Stack)),
            sequences=point.batch,
        )


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Seconds for one of each; what a fit found to cost nothing is 0."""

    layers: float
    weights: float
    products: float
    rank_rows: float
    kv: float
    pages: float
    sequences: float

    @classmethod
    def fit(cls, works: Sequence[StepWork], seconds: Sequence[float]) -> Self:
        """The costs, none below 0, with the least sum of (predicted / measured - 1)^2.

        One that would be below 0 is left out and the others fitted again, the worst first.
        """
        names = [field.name for field in fields(cls)]
        table = np.array([[getattr(work, name) for name in names] for work in works], dtype=np.float64)
        shares = table / np.asarray(seconds)[:, None]
        # Columns differ by ten orders of magnitude; alike in size they are solved for without losing digits.
        size = np.abs(shares).max(axis=0)
        left = [i for i, largest in enumerate(size) if largest > 0]
        found = np.zeros(len(names))
        while left:
            values, *_ = np.linalg.lstsq(shares[:, left] / size[left], np.ones(len(works)), rcond=None)
            if values.min() >= 0:
                found[left] = values / size[left]
                break
            left.pop(int(values.argmin()))
        return cls(**dict(zip(names, found.tolist(), strict=True)))

    def parts_s(self, work: StepWork) -> dict[str, float]:
        """Seconds of each kind of work."""
        return {name: getattr(self, name) * amount for name, amount in asdict(work).items()}

    def seconds(self, work: StepWork) -> float:
        return sum(self.parts_s(work).values())


def sizes_of(model: LlamaConfig) -> dict[str, Any]:
    """What a record must hold of a model so that the work of its steps can be told."""
    return {name: getattr(model, name) for name in ("name", *_SIZES)}


def model_of(sizes: dict[str, Any]) -> LlamaConfig:
    """The inverse: a config good for counting work."""
    return LlamaConfig(**sizes, rms_norm_eps=1e-5, max_position=1)


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
)
