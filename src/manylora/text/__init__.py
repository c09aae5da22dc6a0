"""The text engine: continuous batching of one decoder with a mixture of adapters for every request.

A name is imported when it is first used: settings can be read without torch, as the server's API process does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manylora.text.config import EngineConfig
    from manylora.text.engine import Engine
    from manylora.text.output import Completion, Output
    from manylora.text.params import SamplingParams
    from manylora.text.policies import make_policy
    from manylora.text.policy import AdapterClustering, FirstComeFirstServed, Policy
    from manylora.text.residency import ResidentInfo
    from manylora.text.stats import EngineStats

_HOME = {
    "Engine": "engine",
    "EngineConfig": "config",
    "EngineStats": "stats",
    "ResidentInfo": "residency",
    "SamplingParams": "params",
    "Output": "output",
    "Completion": "output",
    "Policy": "policy",
    "FirstComeFirstServed": "policy",
    "AdapterClustering": "policy",
    "make_policy": "policies",
}
"""Where each public name lives."""

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineStats",
    "ResidentInfo",
    "SamplingParams",
    "Output",
    "Completion",
    "Policy",
    "FirstComeFirstServed",
    "AdapterClustering",
    "make_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'manylora.text' has no attribute '{name}'")
    return getattr(import_module(f"manylora.text.{_HOME[name]}"), name)
