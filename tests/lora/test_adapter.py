import dataclasses
import math
import time

import pytest
import torch

from manylora.errors import AdapterFormatError
from manylora.lora.adapter import Adapter, LoraPair, widest


def make_pair(rank=4, features=(16, 12), scaling=2.0, dtype=torch.float32, seed=0, kernel_size=None):
    generator = torch.Generator().manual_seed(seed)
    return LoraPair(
        torch.randn(rank, features[0], generator=generator).to(dtype),
        torch.randn(features[1], rank, generator=generator).to(dtype),
        scaling,
        kernel_size,
    )


def test_delta_is_the_scaled_product():
    pair = LoraPair(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), 0.5)
    assert pair.delta().tolist() == [[1.5, 3.0], [2.0, 4.0]]
    assert pair.delta().dtype == torch.float64
    assert pair.delta(torch.float32).dtype == torch.float32


def test_sites_are_sorted_and_counted():
    adapter = Adapter({"b": make_pair(rank=2), "a": make_pair(rank=3, dtype=torch.float32)})
    assert list(adapter.sites) == ["a", "b"]
    assert adapter.ranks == {"a": 3, "b": 2}
    assert adapter.num_bytes == (2 + 3) * (16 + 12) * 4
    assert adapter.dtype == torch.float32


def test_equal_content_has_an_equal_id_whatever_its_name_order_and_memory_layout():
    adapter = Adapter({"a": make_pair(seed=1), "b": make_pair(seed=2)}, name="alice", base_model="llama")
    pair = make_pair(seed=2)
    transposed = dataclasses.replace(pair, lora_a=pair.lora_a.t().contiguous().t())
    assert not transposed.lora_a.is_contiguous()
    assert Adapter({"b": transposed, "a": make_pair(seed=1)}).identity == adapter.identity
    requires_grad = dataclasses.replace(pair, lora_b=pair.lora_b.clone().requires_grad_())
    assert Adapter({"b": requires_grad, "a": make_pair(seed=1)}).identity == adapter.identity


def test_any_change_of_content_changes_the_id():
    pair = make_pair()
    flipped = pair.lora_b.clone()
    flipped.view(torch.int32)[0, 0] ^= 1
    changes = {
        "nothing": {"q": pair},
        "site": {"k": pair},
        "one bit": {"q": dataclasses.replace(pair, lora_b=flipped)},
        "scaling": {"q": dataclasses.replace(pair, scaling=math.nextafter(2.0, 3.0))},
        "dtype": {"q": make_pair(dtype=torch.bfloat16)},
        "other dtype of equal bytes": {
            "q": LoraPair(
                make_pair(dtype=torch.bfloat16).lora_a.view(torch.float16),
                make_pair(dtype=torch.bfloat16).lora_b.view(torch.float16),
                2.0,
            )
        },
        "kernel": {"q": dataclasses.replace(pair, kernel_size=(1, 1))},
        "other kernel": {"q": dataclasses.replace(pair, kernel_size=(1, 2))},
        "shape of equal bytes": {"q": LoraPair(pair.lora_a.view(8, 8), pair.lora_b.view(6, 8), 2.0)},
        "one more site": {"q": pair, "r": pair},
    }
    ids = {name: Adapter(sites).identity for name, sites in changes.items()}
    assert len(set(ids.values())) == len(changes), ids


def test_hashing_an_adapter_of_megabytes_takes_milliseconds():
    sites = {
        f"layers.{i}.q": make_pair(rank=16, features=(576, 576), dtype=torch.bfloat16) for i in range(120)
    }
    adapter = Adapter(sites)
    assert adapter.num_bytes > 4_000_000
    start = time.perf_counter()
    assert adapter.identity
    assert (
        time.perf_counter() - start < 0.5
    )  # 10 ms here; bytes turned into Python objects would take seconds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sound_adapters_are_valid(dtype):
    Adapter(
        {"q": make_pair(dtype=dtype), "conv": make_pair(features=(18, 5), kernel_size=(3, 3), dtype=dtype)}
    ).validate()


def spoil(which, value):
    pair = make_pair()
    tensor = getattr(pair, which).clone()
    tensor[1, 2] = value
    return dataclasses.replace(pair, **{which: tensor})


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (spoil("lora_a", math.nan), "lora_a holds NaN or Inf in 1 of 64"),
        (spoil("lora_b", math.inf), "lora_b holds NaN or Inf in 1 of 48"),
        (spoil("lora_b", -math.inf), "lora_b holds NaN or Inf"),
        (make_pair(rank=0), "at least 1"),
        (make_pair(features=(0, 12)), "at least 1"),
        (
            LoraPair(torch.ones(4, 16), torch.ones(12, 5), 1.0),
            "lora_a .4, 16. has rank 4, lora_b .12, 5. has rank 5",
        ),
        (LoraPair(torch.ones(4), torch.ones(12, 4), 1.0), "expected lora_a .rank, in."),
        (LoraPair(torch.ones(4, 1, 3, 3), torch.ones(12, 4, 1, 1), 1.0), "expected lora_a .rank, in."),
        (make_pair(dtype=torch.float64), "lora_a is torch.float64, expected one of"),
        (make_pair(dtype=torch.int32), "lora_a is torch.int32"),
        (
            dataclasses.replace(make_pair(), lora_b=torch.ones(12, 4).half()),
            "convert all sites to one dtype",
        ),
        (make_pair(scaling=math.nan), "scaling is nan"),
        (make_pair(kernel_size=(3, 3)), "no whole number of channels"),
        (make_pair(kernel_size=(0, 3)), "no whole number of channels"),
    ],
)
def test_an_unsound_site_is_named_with_what_is_wrong(pair, says):
    with pytest.raises(AdapterFormatError, match=rf"adapter 'alice', site 'layers.1.q': .*{says}"):
        Adapter({"layers.1.q": pair}, name="alice").validate()


def test_sites_of_different_dtypes_are_refused_and_so_is_no_site():
    mixed = Adapter({"a": make_pair(), "b": make_pair(dtype=torch.float16)})
    with pytest.raises(AdapterFormatError, match=r"site .b.: lora_a is torch\.float16, the first site is"):
        mixed.validate()
    with pytest.raises(AdapterFormatError, match="has no site"):
        Adapter({}).validate()


def test_the_widest_dtype_holds_all_exactly():
    assert widest([torch.bfloat16, torch.bfloat16]) == torch.bfloat16
    assert widest([torch.float16, torch.float32]) == torch.float32
    assert widest([torch.bfloat16, torch.float16]) == torch.float32  # neither holds the other
