"""Policies by name."""

from __future__ import annotations

import pytest

from manylora.bench.serve.policies import LastInFirstOut
from manylora.errors import ConfigError
from manylora.text import AdapterClustering, FirstComeFirstServed, make_policy
from manylora.text.policies import POLICIES
from manylora.text.policy_fair import FairShare
from manylora.text.policy_slo import FirstTokenDeadline


def test_each_name_makes_its_policy_with_its_options() -> None:
    assert {name: type(make_policy(name)) for name in POLICIES} == {
        "fcfs": FirstComeFirstServed,
        "cluster": AdapterClustering,
        "fair": FairShare,
        "slo": FirstTokenDeadline,
    }
    clustering = make_policy("cluster", max_distinct=3, max_overtaken=5)
    assert isinstance(clustering, AdapterClustering)
    assert (clustering.max_distinct, clustering.max_overtaken) == (3, 5)


def test_unknown_names_and_options_are_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match="unknown policy 'lifo'; known: fcfs, cluster, fair, slo"):
        make_policy("lifo")
    with pytest.raises(ConfigError, match=r"'cluster' has no option \['d'\].*max_distinct.*max_overtaken"):
        make_policy("cluster", d=3)
    with pytest.raises(ConfigError, match=r"'fcfs' has no option \['margin'\]"):
        make_policy("fcfs", margin=0.1)


def test_a_policy_of_ones_own_is_named_by_where_it_is() -> None:
    assert isinstance(make_policy("manylora.bench.serve.policies:LastInFirstOut"), LastInFirstOut)
    for name, reason in {
        "manylora.nowhere:Policy": "cannot be imported",
        "manylora.bench.serve.policies:Nobody": "cannot be imported",
        ":Policy": "cannot be imported",
        "manylora.bench.serve.policies:MARGIN_S": "no subclass",
        "manylora.text.scheduler:Scheduler": "no subclass",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            make_policy(name)
