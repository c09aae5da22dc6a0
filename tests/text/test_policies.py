"""Policies by name, and S-LoRA's to compare with."""

from __future__ import annotations

import pytest

from manylora.bench.serve_policies import EarlyAbort, LastInFirstOut
from manylora.errors import ConfigError, OverloadedError
from manylora.text import AdapterClustering, FirstComeFirstServed, make_policy
from manylora.text.policies import POLICIES
from manylora.text.policy import Policy
from manylora.text.policy_fair import FairShare
from manylora.text.policy_slo import FirstTokenDeadline
from manylora.text.scheduler import Scheduled
from manylora.text.sequence import Sequence
from tests.text.test_policy_slo import sequence


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
    assert isinstance(make_policy("manylora.bench.serve_policies:LastInFirstOut"), LastInFirstOut)
    for name, reason in {
        "manylora.nowhere:Policy": "cannot be imported",
        "manylora.bench.serve_policies:Nobody": "cannot be imported",
        ":Policy": "cannot be imported",
        "manylora.bench.serve_policies:MARGIN_S": "no subclass",
        "manylora.text.scheduler:Scheduler": "no subclass",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            make_policy(name)


def arrivals(by: Policy, waiting: list[Sequence]) -> list[int]:
    return [one.request.arrival for one in by.order(waiting, [])]


def test_last_in_first_out_is_that() -> None:
    assert arrivals(LastInFirstOut(), [sequence(number, 1, 1) for number in range(3)]) == [2, 1, 0]


def test_early_abort_drops_half_a_second_before_the_deadline_but_not_what_has_run() -> None:
    new, patient, preempted = sequence(0, 1, 1), sequence(1, 1, 1, within=None), sequence(2, 1, 1)
    preempted.num_cached = 0
    by = EarlyAbort()
    assert list(by.refuse([new, patient, preempted], [], 5.49)) == []
    ((dropped, error),) = by.refuse([new, patient, preempted], [], 5.5)
    assert dropped is new
    assert isinstance(error, OverloadedError)


def test_early_abort_takes_the_newest_while_more_come_than_are_admitted() -> None:
    by = EarlyAbort()
    waiting = [sequence(number, 1, 1) for number in range(9)]
    assert arrivals(by, waiting[:1]) == [0]
    by.stepped([Scheduled(waiting[0], 1)], 0.1)
    assert arrivals(by, waiting[1:]) == [8, 7, 6, 5, 4, 3, 2, 1], "eight came, one was admitted"
    by.stepped([Scheduled(one, 1) for one in waiting[3:]], 0.1)
    assert arrivals(by, waiting[1:3]) == [1, 2], "none came since six were admitted"
