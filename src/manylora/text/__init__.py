"""The text engine: continuous batching of one decoder with a mixture of adapters for every request."""

from manylora.text.config import EngineConfig
from manylora.text.engine import Engine, EngineStats
from manylora.text.output import Completion, Output
from manylora.text.params import SamplingParams
from manylora.text.policy import AdapterClustering, FirstComeFirstServed, Policy

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineStats",
    "SamplingParams",
    "Output",
    "Completion",
    "Policy",
    "FirstComeFirstServed",
    "AdapterClustering",
]
