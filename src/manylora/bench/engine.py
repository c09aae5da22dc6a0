"""How measurements step our engine, and how much room they give it."""

from __future__ import annotations

from manylora.bench.floor import DecoderCosts, adapter_bytes
from manylora.models.llama import Llama
from manylora.text import Engine, Output
from manylora.text.pool import kv_dtype_of

PACKED = 1.1
"""An adapter's room in pages over its bytes, at most: pages of PAGE_TOKENS waste less."""

PAGE_TOKENS = 64
"""No page holds more."""


def step(engine: Engine) -> list[Output]:
    """Step the engine; what fails in a measurement ends it.

    Raises:
        ManyLoraError: the reason for which a request failed.
    """
    outputs = engine.step()
    for output in outputs:
        if output.event is not None and output.event.error is not None:
            raise output.event.error
    return outputs


def token_bytes(model: Llama) -> int:
    """KV of one token."""
    return DecoderCosts(model.config, kv_dtype_of(model).itemsize).kv_bytes_per_token


def adapter_room(model: Llama, rank: int) -> int:
    """Bytes of the pool that an adapter of this rank on all sites takes at most."""
    return int(PACKED * adapter_bytes(model.config, rank)) + PAGE_TOKENS * token_bytes(model)


def sequence_room(model: Llama, num_tokens: int) -> int:
    """Bytes of the pool that the KV of a sequence takes at most."""
    return (num_tokens + PAGE_TOKENS) * token_bytes(model)
