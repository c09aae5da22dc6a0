"""Policies by the names that settings use."""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from manylora.errors import ConfigError
from manylora.text.policy import AdapterClustering, FirstComeFirstServed, Policy
from manylora.text.policy_fair import FairShare
from manylora.text.policy_slo import FirstTokenDeadline

POLICIES: Mapping[str, type[Policy]] = MappingProxyType(
    {
        "fcfs": FirstComeFirstServed,
        "cluster": AdapterClustering,
        "fair": FairShare,
        "slo": FirstTokenDeadline,
    }
)
"""fcfs: in order of arrival. cluster: few distinct adapters at a time. fair: equal shares for tenants and mixtures.
slo: as many first tokens as possible by their deadlines."""


def make_policy(name: str, **options: Any) -> Policy:
    """Make a policy by its name.

    Args:
        options: those of the policy's class, for example max_distinct for "cluster".
    Raises:
        ConfigError: no such policy or option, or a value out of range; says which there are.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown policy '{name}'; known: {', '.join(POLICIES)}")
    known = list(inspect.signature(POLICIES[name]).parameters)
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ConfigError(f"policy '{name}' has no option {unknown}; it has {known}")
    return POLICIES[name](**options)
