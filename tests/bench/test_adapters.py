import torch

from manylora.bench.adapters import adapter_name, write_adapters
from manylora.lora.formats import load_peft
from tests.bench.conftest import NUM_ADAPTERS, RANKS


def test_adapters_have_an_effect_of_the_strength_asked_for(tmp_path):
    # Site names as PEFT's config can say them; two linears are enough.
    sites = {"model.layers.0.self_attn.q_proj": (64, 48), "model.layers.0.self_attn.v_proj": (32, 64)}
    torch.manual_seed(0)
    write_adapters(tmp_path, sites, 2, (1, 16), seed=0, strength=0.05)
    for number in range(2):
        pair = load_peft(tmp_path / adapter_name(number)).sites["model.layers.0.self_attn.q_proj"]
        gain = torch.randn(4000, 64, dtype=torch.float64) @ pair.delta().T
        assert 0.025 < gain.std() < 0.1


def test_written_adapters_differ_and_have_the_ranks_dealt_out(adapters_folder):
    loaded = [load_peft(adapters_folder / adapter_name(number)) for number in range(NUM_ADAPTERS)]
    assert len({adapter.identity for adapter in loaded}) == NUM_ADAPTERS
    assert [set(adapter.ranks.values()) for adapter in loaded] == [
        {RANKS[i % 2]} for i in range(NUM_ADAPTERS)
    ]
    assert {adapter.dtype for adapter in loaded} == {torch.bfloat16}
    assert len(loaded[0].sites) == 2 * 7
