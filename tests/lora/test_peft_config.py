import dataclasses
import itertools
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from manylora.errors import AdapterFormatError
from manylora.lora.peft_config import config_for, parse_config, scaling_of
from manylora.lora.peft_keys import INERT, REFUSED, USED

MINIMAL = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}

SET = {
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "modules_to_save": ["classifier"],
    "trainable_token_indices": [3],
    "target_parameters": ["experts.gate_up_proj"],
    "use_dora": True,
    "lora_bias": True,
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1.0},
    "monteclora_config": {"num_samples": 8},
    "velora_config": {"num_groups": 64},
    "layer_replication": [[0, 4], [2, 5]],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "ensure_weight_tying": True,
}


def parse(**values):
    return parse_config(MINIMAL | values, "the file")


def test_every_key_of_peft_has_one_treatment():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == USED | INERT.keys() | REFUSED.keys()
    assert len(fields) == len(USED) + len(INERT) + len(REFUSED)
    assert SET.keys() == REFUSED.keys()


@pytest.mark.parametrize("key", SET)
def test_a_refused_key_is_named_when_it_is_set_and_passes_when_it_is_not(key):
    default = LoraConfig().to_dict()[key]
    assert parse(**{key: default}) == parse()
    with pytest.raises(AdapterFormatError, match=f"the file: {key} = .* is not served: "):
        parse(**{key: SET[key]})


def test_inert_keys_change_nothing():
    assert parse(**dict.fromkeys(INERT, "anything")) == parse()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"hadamard": True, "peft_version": "0.99"}, "unknown key 'hadamard' = True of PEFT 0.99"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', only 'LORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": None}, "r must be a whole number above 0, got None"),
        ({"r": 0}, "r must be a whole number above 0, got 0"),
        ({"r": 8.5}, "r must be a whole number"),
        ({"r": True}, "r must be a whole number"),
        ({"lora_alpha": None}, "lora_alpha must be a finite number, got None"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a finite number, got nan"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number"),
        ({"rank_pattern": {"q": "8"}}, r"rank_pattern\['q'\] must be a whole number above 0, got '8'"),
        ({"rank_pattern": {"q[": 8}}, r"rank_pattern: 'q\[' is no regular expression"),
        ({"rank_pattern": ["q"]}, "rank_pattern must map names to numbers"),
        ({"alpha_pattern": {"q": math.inf}}, r"alpha_pattern\['q'\] must be a finite number"),
        ({"target_modules": "(q"}, "target_modules: '.q' is no regular expression"),
        ({"target_modules": [1]}, "target_modules must be a name or a list of names"),
        ({"exclude_modules": {"q": 1}}, "exclude_modules must be a name or a list"),
        ({"layers_to_transform": "0"}, "layers_to_transform must be one or more layers, got '0'"),
        ({"layers_to_transform": [0], "target_modules": "q"}, "layers_to_transform needs a list"),
        ({"init_lora_weights": "pissa_niter_16"}, "changes the base weight"),
        ({"init_lora_weights": "olora"}, "changes the base weight"),
        ({"init_lora_weights": "loftq"}, "path_initial_model_for_weight_conversion"),
    ],
)
def test_a_key_that_holds_nonsense_is_named(values, says):
    with pytest.raises(AdapterFormatError, match=rf"the file: .*{says}"):
        parse(**values)


def test_a_config_without_rank_or_alpha_is_refused_since_a_default_would_be_a_guess():
    for key in ("r", "lora_alpha"):
        with pytest.raises(AdapterFormatError, match=f"{key} must be"):
            parse_config({name: value for name, value in MINIMAL.items() if name != key}, "the file")


# Every path of up to three of these parts, and paths as they are met: a name that ends with another, numbers that
# count layers and numbers that do not.
PARTS = ["q", "xq", "layers", "0", "12"]
SITES = [".".join(parts) for length in (1, 2, 3) for parts in itertools.product(PARTS, repeat=length)]
SITES += [
    "m.layers.1.q",
    "m.layers.1.experts.0.q",
    "m.h.0.layers.1.q",
    "m.layers.1.0",
    "m.layers.12.mlp.xq",
]
PATTERNS = [
    "q",
    "0.q",
    "layers.0",
    "^q",
    "^layers.0.q",
    "q$",
    "q|xq",
    ".*",
    ".*0.*",
    r"\d+",
    r"layers\.\d+\.q",
    "l.*",
]


def test_patterns_match_as_in_peft():
    """`LoraModel._create_and_replace` looks ranks and alphas up like this."""
    seen = set()
    for first, second in itertools.permutations(PATTERNS, 2):
        pattern = {first: 1, second: 2}
        config = parse(rank_pattern=pattern)
        for site in SITES:
            want = pattern.get(get_pattern_key(pattern.keys(), site), 8)
            assert config.rank(site) == want, (pattern, site)
            seen.add(want)
    assert seen == {1, 2, 8}


TARGETS = [["q"], ["0"], ["layers.0.q", "xq"], ["m.layers.1.q", "q"], "q", ".*q", r".*layers\.[01]\..*"]
EXCLUDED = [None, [], ["q"], ["0.q", "xq"], "q", r".*\.0\..*"]
LAYERS: list[dict[str, Any]] = [
    {},
    {"layers_to_transform": []},
    {"layers_to_transform": 0},
    {"layers_to_transform": [1, 12]},
    {"layers_to_transform": [0], "layers_pattern": "layers"},
    {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"layers_to_transform": [0, 1], "layers_pattern": []},
]


def test_sites_are_named_as_in_peft():
    counts: Counter[bool] = Counter()
    for targets, excluded, layers in itertools.product(TARGETS, EXCLUDED, LAYERS):
        if isinstance(targets, str) and layers:
            continue
        keys = {"target_modules": targets, "exclude_modules": excluded, **layers}
        ours, theirs = parse(**keys), LoraConfig(r=8, lora_alpha=16, **keys)
        for site in SITES:
            want = bool(check_target_module_exists(theirs, site))
            assert (ours.why_not(site) is None) == want, (keys, site)
            counts[want] += 1
    assert min(counts[True], counts[False]) > 1000


def test_why_a_site_is_not_named():
    assert "target_modules ['v'] does not name it" in parse(target_modules=["v"]).why_not("layers.0.q")
    assert "exclude_modules 'layers.*' names it" in parse(exclude_modules="layers.*").why_not("layers.0.q")
    one_layer = parse(target_modules=["q"], layers_to_transform=3)
    assert "layers_to_transform is [3], without its layer, 0" in one_layer.why_not("model.layers.0.q")
    assert "it has no layer that PEFT sees" in one_layer.why_not("q.q")
    assert parse(target_modules="all-linear").why_not("layers.0.q") is None
    assert parse().why_not("layers.0.q") is None


ALPHAS = st.floats(-1e3, 1e3, allow_nan=False).filter(lambda alpha: alpha == 0 or abs(alpha) > 1e-9)


@settings(deadline=None, max_examples=100)
@given(
    sites=st.dictionaries(
        st.sampled_from(SITES), st.tuples(st.integers(1, 129), ALPHAS), min_size=1, max_size=5
    ),
    use_rslora=st.booleans(),
)
def test_a_written_config_gives_each_site_its_rank_and_its_scaling_to_the_last_bit(sites, use_rslora):
    wanted = {site: (rank, scaling_of(alpha, rank, use_rslora)) for site, (rank, alpha) in sites.items()}
    config = parse_config(config_for(wanted, None, "an adapter"), "the file")
    assert {site: (config.rank(site), config.scaling(site)) for site in wanted} == wanted
    assert all(config.why_not(site) is None for site in wanted)


def test_a_written_config_keeps_what_people_wrote():
    rslora = {site: (8, scaling_of(16, 8, use_rslora=True)) for site in ("layers.0.q", "layers.1.q")}
    config = config_for(rslora, "base", "an adapter")
    assert (config["use_rslora"], config["r"], config["lora_alpha"]) == (True, 8, 16)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == ["layers.0.q", "layers.1.q"]
    assert config["base_model_name_or_path"] == "base"
    assert config_for({"layers.0.q": (8, 2.0)}, None, "")["use_rslora"] is False


def test_a_scaling_that_no_alpha_gives_is_refused_with_one_that_can_be_saved():
    def says_no(scaling):
        try:
            config_for({"layers.0.q": (3, scaling)}, None, "adapter 'alice'")
        except AdapterFormatError as error:
            return str(error)

    refused = {
        scaling: message for scaling in (k / 1000 for k in range(1, 1000)) if (message := says_no(scaling))
    }
    assert refused, "every scaling has an alpha: then this test and the message can go"
    for scaling, message in refused.items():
        assert "adapter 'alice', site 'layers.0.q'" in message
        nearest = float(message.rsplit("; ", 1)[1].split()[0])
        assert nearest == pytest.approx(scaling, rel=1e-15)
        assert says_no(nearest) is None
