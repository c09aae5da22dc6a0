import pytest
import torch

from manylora.errors import AdapterMismatchError
from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.fit import check_fits, move_sites

BASE = {f"model.layers.{layer}.{name}_proj": (16, 12) for layer in range(4) for name in "qkvo"}


def adapter_of(sites, shape=(16, 12)):
    pair = LoraPair(torch.ones(2, shape[0]), torch.ones(shape[1], 2), 1.0)
    return Adapter(dict.fromkeys(sites, pair), name="legal-v2", base_model="some/llama")


def refusal(adapter):
    with pytest.raises(AdapterMismatchError) as refused:
        check_fits(adapter, BASE, "tiny-llama")
    return str(refused.value)


def test_an_adapter_of_some_or_all_sites_fits():
    check_fits(adapter_of(BASE), BASE, "tiny-llama")
    check_fits(adapter_of(["model.layers.3.o_proj"]), BASE, "tiny-llama")


def test_an_adapter_of_a_wrapper_is_refused_with_the_renaming_that_would_do():
    wrapped = adapter_of(site.replace("model.", "model.language_model.") for site in BASE)
    message = refusal(wrapped)
    assert message.startswith("adapter 'legal-v2' fits no module of 'tiny-llama'.")
    assert "adapter names: model.language_model.layers.0.k_proj" in message
    assert "(+ 13 more)" in message
    assert "model names:   model.layers.0.q_proj" in message
    assert "move_sites(adapter, 'model.language_model.', 'model.')" in message
    check_fits(move_sites(wrapped, "model.language_model.", "model."), BASE, "tiny-llama")


@pytest.mark.parametrize(("old", "new"), [("", "model."), ("decoder.", "model."), ("a.b.", "model.")])
def test_the_renaming_in_the_message_makes_it_fit(old, new):
    renamed = adapter_of(old + site.removeprefix("model.") for site in BASE)
    message = refusal(renamed)
    assert f"move_sites(adapter, {old!r}, {new!r})" in message
    check_fits(move_sites(renamed, old, new), BASE, "tiny-llama")


def test_a_renaming_is_not_advised_when_it_would_not_fit():
    other_size = adapter_of((site.removeprefix("model.") for site in BASE), shape=(16, 13))
    assert "It was trained on some/llama." in refusal(other_size)


def test_an_adapter_that_fits_in_part_is_refused():
    message = refusal(adapter_of([*BASE, "model.layers.4.q_proj", "model.layers.5.q_proj"]))
    assert "adapter 'legal-v2' has 16 of 18 sites in 'tiny-llama'." in message
    assert "model.layers.4.q_proj" in message
    assert "model.layers.5.q_proj" in message
    assert "It was trained on some/llama." in message


def test_other_sizes_are_named():
    sites = dict(adapter_of(BASE).sites)
    sites["model.layers.1.k_proj"] = LoraPair(torch.ones(2, 16), torch.ones(24, 2), 1.0)
    message = refusal(Adapter(sites, name="legal-v2"))
    assert "does not fit 'tiny-llama': 1 of 16 sites have another size." in message
    assert "model.layers.1.k_proj: expected in 16, out 12, got in 16, out 24" in message
    assert "a model that its file does not name" in message


def test_only_sites_that_begin_so_can_be_moved():
    with pytest.raises(AdapterMismatchError, match=r"do not begin with 'x\.'"):
        move_sites(adapter_of(BASE), "x.", "")
    with pytest.raises(AdapterMismatchError, match="model names:   none"):
        check_fits(adapter_of(BASE), {}, "empty")
