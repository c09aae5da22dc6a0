"""Our quick way into PEFT's layers leaves the model that PEFT's own way leaves."""

import pytest
import torch

from manylora.bench.adapters import adapter_name, write_adapters
from manylora.bench.peers.hugging_face import load_causal_lm
from manylora.bench.peers.peft_loading import load_peft_model

NAMES = [adapter_name(number) for number in range(3)]


def test_every_weight_and_scaling_is_as_peft_loads_it(tiny_model, adapters_folder):
    from peft import PeftModelForCausalLM
    from peft.tuners.lora import LoraLayer

    ours = load_peft_model(load_causal_lm(tiny_model, "float32"), adapters_folder, NAMES)
    theirs = PeftModelForCausalLM.from_pretrained(
        load_causal_lm(tiny_model, "float32"), adapters_folder / NAMES[0], adapter_name=NAMES[0]
    )
    for name in NAMES[1:]:
        theirs.load_adapter(adapters_folder / name, adapter_name=name)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert sum(f".{NAMES[2]}." in key for key in ours.state_dict()) == 2 * 14
    layers = zip(ours.modules(), theirs.modules(), strict=True)
    pairs = [(our, their) for our, their in layers if isinstance(our, LoraLayer)]
    assert len(pairs) == 14
    for our, their in pairs:
        assert (our.scaling, our.r, our.active_adapters) == (their.scaling, their.r, their.active_adapters)
    assert ours.peft_config.keys() == theirs.peft_config.keys()
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_an_adapter_of_other_sites_is_refused(tiny_model, adapters_folder, tmp_path):
    sites = {"model.layers.0.self_attn.q_proj": (32, 32)}
    write_adapters(tmp_path, sites, 1, (2,), seed=1)
    (tmp_path / NAMES[0]).rename(tmp_path / NAMES[1])
    (tmp_path / NAMES[0]).symlink_to(adapters_folder / NAMES[0])
    with pytest.raises(ValueError, match="other sites"):
        load_peft_model(load_causal_lm(tiny_model, "float32"), tmp_path, NAMES[:2])
