"""What an engine tells of itself, for people and metrics."""

from dataclasses import dataclass

from manylora.memory.unified import MemoryUse


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine began, and what holds at this moment."""

    num_steps: int
    step_seconds: float
    """Time spent in steps that computed something, all together."""
    num_prefill_tokens: int
    """Tokens computed to fill the KV of prompts, and of what was preempted; without those found in the prefix cache."""
    num_output_tokens: int
    """Tokens sampled."""
    num_ended: int
    """Sequences that ended, however they did."""
    num_waiting: int
    num_running: int
    num_preemptions: int
    adapter_loads: int
    adapter_hits: int
    adapter_evictions: int
    num_resident_adapters: int
    prefix_hit_tokens: int
    distinct_adapters_last_step: int
    pool_bytes: MemoryUse
    """Who holds the pool, in bytes."""
    waiting_adapters: tuple[str, ...]
    """Names that waiting sequences ask for, sorted."""
    running_adapters: tuple[str, ...]
    """Names that running sequences ask for, sorted."""
