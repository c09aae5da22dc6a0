"""Whoever makes an adapter writes its regular expressions: none of them stops whoever reads it."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

import pytest

from manylora.errors import AdapterFormatError
from manylora.lora import site_patterns
from manylora.lora.peft_config import PeftConfig, config_for, parse_config
from manylora.lora.site_patterns import SitePatterns

SITE = "model.layers.0.self_attn.q_proj"
ENDLESS = r"(?:(?:[a-z]|\w|.)*(?:.|\.)?)*(?<=9)"
"""Tries every way to divide a site among three alternatives: with `re`, years."""


def parse(**values: Any) -> PeftConfig:
    return parse_config({"peft_type": "LORA", "r": 8, "lora_alpha": 16} | values, "the file")


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 4}},
        {"alpha_pattern": {ENDLESS: 4}},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": [ENDLESS]},
    ],
)
def test_a_pattern_that_finds_no_end_is_refused_in_time(values, monkeypatch):
    monkeypatch.setattr(site_patterns, "MAX_MATCH_S", 0.2)
    config = parse(**values)
    began = time.monotonic()
    with pytest.raises(AdapterFormatError, match=r"the file: .*longer than 0\.2 s.* list of names"):
        _ = config.why_not(SITE), config.scaling(SITE)
    assert time.monotonic() - began < 60  # on a machine that is busy with something else


def test_who_matches_for_long_lets_other_threads_run(monkeypatch):
    monkeypatch.setattr(site_patterns, "MAX_MATCH_S", 0.5)
    config, is_over, turns = parse(target_modules=ENDLESS), threading.Event(), 0

    def other() -> None:
        nonlocal turns
        while not is_over.is_set():
            time.sleep(0.005)
            turns += 1

    thread = threading.Thread(target=other)
    thread.start()
    before = turns
    with pytest.raises(AdapterFormatError):
        config.why_not(SITE)
    during = turns - before
    is_over.set()
    thread.join()
    assert during >= 5


def test_the_time_of_a_file_is_for_all_its_patterns(monkeypatch):
    monkeypatch.setattr(site_patterns, "MAX_MATCH_S", 0.1)
    patterns = SitePatterns("the file")
    patterns.add("q", "target_modules", "q")

    def many() -> None:
        for _ in range(10_000_000):
            patterns.match("q", "q")

    with pytest.raises(AdapterFormatError, match="list of names"):
        many()


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(?:" * 3 + "ab" + "){1000}" * 3, "items, repeats written out"),
        ("(" * 30 + "a" + ")+" * 30, "items, repeats written out"),
        ("(?:a{9999}){9999}", "items, repeats written out"),
        ("(" * 5000 + ")" * 5000, "no regular expression"),
        ("a{99999999999999999999}", "no regular expression"),
        ("(?<layer>a)", "no regular expression"),
        ("q|" * 40_000, "65,536 characters, got 80,000"),
    ],
)
def test_a_pattern_that_would_not_fit_in_memory_is_refused_before_it_is_compiled(pattern, says):
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        with pytest.raises(AdapterFormatError, match=rf"the file: {key}: .*{says}"):
            parse(**{key: pattern})
    with pytest.raises(AdapterFormatError, match=rf"the file: rank_pattern: .*{says}"):
        parse(rank_pattern={pattern: 4})


@pytest.mark.parametrize("key", ["(?i)q", "(?P<layer>q)", "q)|(v"])
def test_what_peft_could_not_build_into_its_own_pattern_is_refused(key):
    with pytest.raises(AdapterFormatError, match="no regular expression"):
        parse(layers_pattern=[key])


def test_what_people_write_is_taken():
    """A pattern as trainers of models that also see write it, and one of ours for a model of many sites."""
    layers = r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\..*)"
    for pattern in (
        layers,
        r"^(?!.*visual).*(?:q_proj|k_proj)$",
        r"model\.layers\.([0-9]|1[0-5])\..+_proj",
    ):
        assert parse(target_modules=pattern).why_not(SITE) is None
        assert (re.fullmatch(pattern, "visual.q") is None) == bool(
            parse(target_modules=pattern).why_not("visual.q")
        )
    sites = {f"block_{i}_of_the_middle_of_the_network_{'x' * 20}": (1 + i % 7, 0.5) for i in range(200)}
    config = parse_config(config_for(sites, None, "ours"), "ours")
    assert len(config.rank_pattern) > 100
    for site, (rank, scaling) in sites.items():
        assert (config.why_not(site), config.rank(site), config.scaling(site)) == (None, rank, scaling)
