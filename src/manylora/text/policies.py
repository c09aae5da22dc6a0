"""Policies by the names that settings use."""

import inspect
from collections.abc import Mapping
from importlib import import_module
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
    """Make a policy by its name, or one of your own by where its class is: "package.module:Class".

    Args:
        options: those of the policy's class, for example max_distinct for "cluster".
    Raises:
        ConfigError: no such policy or option, or a value out of range; says which there are.
    """
    policy = POLICIES.get(name) or _import(name)
    known = list(inspect.signature(policy).parameters)
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ConfigError(f"policy '{name}' has no option {unknown}; it has {known}")
    return policy(**options)


def _import(name: str) -> type[Policy]:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"unknown policy '{name}'; known: {', '.join(POLICIES)}, or package.module:Class for one of your own"
        )
    try:
        policy = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"policy '{name}' cannot be imported: {error}") from error
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise ConfigError(f"policy '{name}' is no subclass of manylora.text.Policy")
    return policy
