import json
import shutil
from collections import Counter

import pytest
import torch

from manylora.errors import ConfigError
from manylora.lora import synthetic
from manylora.lora.formats import load_peft
from manylora.lora.synthetic import generate_adapters, synthetic_adapter

SITES = {"layers.0.q_proj": (24, 16), "layers.0.down_proj": (40, 24), "layers.1.q_proj": (24, 16)}


def test_every_adapter_has_other_content_and_all_sites(tmp_path):
    names = generate_adapters(tmp_path, SITES, 40, base_model="tiny")
    assert names[:2] == ["synthetic-0000", "synthetic-0001"]
    adapters = [load_peft(tmp_path / name) for name in names]
    assert len({adapter.identity for adapter in adapters}) == 40
    for adapter in adapters:
        assert set(adapter.sites) == set(SITES)
        assert adapter.dtype == torch.bfloat16
        assert adapter.base_model == "tiny"
        assert len(set(adapter.ranks.values())) == 1
    assert adapters[3].identity == synthetic_adapter(SITES, 3, seed=0).identity


def test_the_seed_and_nothing_else_decides():
    first, again, other = (synthetic_adapter(SITES, 5, seed) for seed in (0, 0, 1))
    assert first.identity == again.identity
    assert first.identity != other.identity


def test_ranks_follow_the_power_law():
    site = {"q": (1, 1)}
    ranks = Counter(synthetic_adapter(site, number, seed=0).ranks["q"] for number in range(3000))
    assert set(ranks) == set(range(1, 17))
    shares = [rank**-synthetic.RANK_EXPONENT for rank in range(1, 17)]
    for rank, share in enumerate(shares, 1):
        expected = 3000 * share / sum(shares)
        assert abs(ranks[rank] - expected) < 5 * expected**0.5
    assert 2.6 < sum(rank * count for rank, count in ranks.items()) / 3000 < 3.2


def test_what_an_output_gains_has_the_strength_asked_for_at_every_rank():
    sites = {"q": (512, 512)}
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    seen = set()
    for number in range(30):
        pair = synthetic_adapter(sites, number, seed=0, strength=0.05).sites["q"]
        gain = x @ pair.delta(torch.float32).T
        assert gain.std().item() == pytest.approx(0.05, rel=0.25)
        seen.add(pair.rank)
    assert len(seen) > 3


def test_an_interrupted_call_is_finished_by_the_next_and_makes_nothing_twice(tmp_path):
    whole = [
        load_peft(tmp_path / "whole" / name).identity
        for name in generate_adapters(tmp_path / "whole", SITES, 6)
    ]

    def stop_at_three(number):
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_adapters(tmp_path / "cut", SITES, 6, on_written=stop_at_three)
    written = sorted(path for path in (tmp_path / "cut").iterdir() if path.is_dir())
    assert len(written) == 3
    (written[0] / "adapter_config.json").unlink()
    times = [(path / "adapter_model.safetensors").stat().st_mtime_ns for path in written]
    names = generate_adapters(tmp_path / "cut", SITES, 6)
    assert [load_peft(tmp_path / "cut" / name).identity for name in names] == whole
    now = [(path / "adapter_model.safetensors").stat().st_mtime_ns for path in written]
    assert now[0] != times[0], "the broken one was made again"
    assert now[1:] == times[1:]


def test_more_of_the_same_seed_leaves_the_first_as_they_are(tmp_path):
    generate_adapters(tmp_path, SITES, 2)
    before = load_peft(tmp_path / "synthetic-0001").identity
    shutil.rmtree(tmp_path / "synthetic-0001")
    generate_adapters(tmp_path, SITES, 4)
    assert load_peft(tmp_path / "synthetic-0001").identity == before


def test_a_folder_of_other_arguments_is_refused(tmp_path):
    generate_adapters(tmp_path, SITES, 1)
    with pytest.raises(
        ConfigError, match=r"made with other values of \['seed', 'strength'\]; delete the folder"
    ):
        generate_adapters(tmp_path, SITES, 1, seed=1, strength=0.1)
    (tmp_path / synthetic.MANIFEST).write_text("{")
    with pytest.raises(ConfigError, match="made with other values"):
        generate_adapters(tmp_path, SITES, 1)


def test_the_manifest_says_what_made_them(tmp_path):
    generate_adapters(tmp_path, SITES, 1, seed=7)
    assert json.loads((tmp_path / synthetic.MANIFEST).read_text())["seed"] == 7


@pytest.mark.parametrize("bad", [{"count": 0}, {"count": 1, "max_rank": 0}, {"count": 1, "strength": 0.0}])
def test_numbers_out_of_range(tmp_path, bad):
    with pytest.raises(ConfigError, match="must be at least 1 and strength positive"):
        generate_adapters(tmp_path, SITES, **bad)
