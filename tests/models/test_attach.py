"""`attach` against PEFT, row by row: an encoder, a causal language model, and a diffusion UNet with LoRAs of convs."""

import random
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from manylora import Adapter, Library, LoraPair, Mixture, attach
from manylora.errors import AdapterMismatchError, AdapterNotFoundError, CapacityError, ConfigError
from tests.models.attach_cases import (
    CASES,
    Oracle,
    fingerprint,
    make_oracle,
    output_of,
    rows_of,
)

PAGE = 64 * 1024
"""Bytes; each adapter here takes one page."""

# Kernels hold weights in float32: these are exact in it, so float64 can be asked for all its digits.
MIXTURES: list[str | Mapping[str, float] | None] = [
    "plain",
    None,
    {"plain": 0.5, "rslora": -0.25},
    "rslora",
    {"other": 1.5, "pattern": -0.5, "plain": 0.75},
    "pattern",
    "rslora:1.25",
    None,
    "other",
]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
LEAST_EFFECT = 1e-2


@pytest.fixture(scope="module", params=CASES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_oracle(CASES[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_oracle(CASES["llama"], tmp_path_factory.mktemp("language_model"))


def weights_of(mixture: str | Mapping[str, float] | None) -> dict[str, float]:
    return dict(Mixture.parse(mixture).weights)


def assert_rows_are_pefts(
    got: Tensor, base: Tensor, expected: Mapping[int, Tensor], mixtures: list[dict[str, float]]
) -> None:
    """Row i must be what PEFT gives for its mixture, and nothing else for a base row.

    Base rows are equal bit by bit: their products are made in a batch of the same shape, and then left alone
    (of a conv, zeros are added to them).
    """
    atol = TOLERANCE[got.dtype]
    for i, mixture in enumerate(mixtures):
        if not mixture:
            assert torch.equal(got[i], base[i]), f"row {i}"
            continue
        assert (expected[i] - base[i]).abs().max() > LEAST_EFFECT, f"row {i}: {mixture} does nothing"
        difference = (got[i] - expected[i]).abs().max()
        assert difference < atol * max(1.0, float(expected[i].abs().max())), f"row {i}: {mixture}"


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_each_row_of_a_batch_is_what_peft_gives_for_its_mixture(dtype, oracle):
    """Then with copies=2, as guidance runs [uncond, cond] in one batch: row i and row N + i have mixture i."""
    oracle, num_rows = oracle.to(dtype), len(MIXTURES)
    inputs = oracle.case.inputs(2 * num_rows, dtype)
    mixtures = [weights_of(mixture) for mixture in MIXTURES]
    expected: dict[int, Tensor] = {}
    for i, mixture in enumerate(mixtures):
        if mixture:
            both = oracle.expected(
                mixture, {name: value[[i, num_rows + i]] for name, value in inputs.items()}
            )
            expected[i], expected[num_rows + i] = both
    once = rows_of(inputs, 0, num_rows)
    base_once, base_twice = output_of(oracle.base, once), output_of(oracle.base, inputs)
    with attach(oracle.base, Library(oracle.folder)) as lora:
        with lora.rows(MIXTURES):
            got_once = output_of(oracle.base, once)
        with lora.rows(MIXTURES, copies=2):
            got_twice = output_of(oracle.base, inputs)
    assert got_once.dtype == got_twice.dtype == dtype
    assert_rows_are_pefts(got_once, base_once, expected, mixtures)
    assert_rows_are_pefts(got_twice, base_twice, expected, mixtures * 2)


def test_adapters_that_were_evicted_and_loaded_again_give_the_same(oracle):
    """Two pages for four adapters, a row at a time: every adapter gives way to others before it comes back."""
    oracle = oracle.to(torch.float64)
    inputs = oracle.case.inputs(1, torch.float64)
    base = output_of(oracle.base, inputs)
    names = list(oracle.case.adapters)
    loads: list[str] = []
    library = Library(oracle.folder)
    load = library.load
    library.load = lambda ref: loads.append(ref.name) or load(ref)  # type: ignore[method-assign,assignment,func-returns-value,union-attr]
    with attach(oracle.base, library, memory_bytes=2 * PAGE) as lora:
        for name in [*names, *names, names[-1]]:
            with lora.rows([name]):
                got = output_of(oracle.base, inputs)
            want = oracle.expected({name: 1.0}, inputs)
            assert (want - base).abs().max() > LEAST_EFFECT
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert loads == names + names, "each was evicted before it came back, and the last was still there"


def test_a_thousand_random_swaps_leave_the_base_as_it_was():
    """The base weights are hashed before and after, and the base gives the same bits in between and afterwards."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    library, names = Library(), [f"a{i}" for i in range(6)]
    for i, name in enumerate(names):
        library.add(name, adapter_of(model, ("0", "2", "4")[i % 3]))
    x = torch.randn(2, 2, 4, 4)
    num_hooks = [len(m._forward_hooks) for m in model.modules()]
    rng, num_changed = random.Random(0), 0
    with torch.inference_mode():
        before, base = fingerprint(model), model(x)
        lora = attach(
            model, library, memory_bytes=3 * PAGE
        )  # half of the adapters, so they are evicted too
        for _ in range(1000):
            mixture = {name: rng.uniform(0.1, 1.5) for name in rng.sample(names, rng.randint(1, 3))}
            with lora.rows([mixture, None]):
                swapped = model(x)
            assert torch.equal(swapped[1], base[1])
            num_changed += not torch.equal(swapped[0], base[0])
        assert num_changed == 1000
        assert torch.equal(model(x), base), "attached, but no rows are open"
        lora.detach()
        assert torch.equal(model(x), base)
    assert [len(m._forward_hooks) for m in model.modules()] == num_hooks
    assert fingerprint(model) == before


def test_the_fingerprint_sees_a_single_bit(language_model):
    model = language_model.to(torch.float32).base
    before = fingerprint(model)
    weight = next(model.parameters())
    weight.data.view(torch.int32).view(-1)[-1] ^= 1
    assert fingerprint(model) != before


class Convs(nn.Module):
    """Convs of every kind of stride, padding and dilation that a LoRA can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 2))
        self.same = nn.Conv2d(4, 5, (2, 4), padding="same")  # more on one side than on the other
        self.dilated = nn.Conv2d(5, 3, 3, padding=2, dilation=(1, 2), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dilated(torch.tanh(self.same(torch.tanh(self.strided(x)))))
        return out


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("site", ["strided", "same", "dilated"])
def test_a_conv_is_followed_in_stride_padding_and_dilation(site):
    """Against the merged weights: PEFT is no judge of dilation, as its own lora_A has none."""
    model = Convs().double()
    library = Library()
    library.add("a", adapter_of(model, site))
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    with torch.inference_mode():
        base = model(x)
        with attach(model, library) as lora, lora.rows([None, "a:-0.5"]):
            got = model(x)
        weight = model.get_submodule(site).get_parameter("weight")
        weight.add_(-0.5 * library.load("a").sites[site].delta().view_as(weight))
        want = model(x)
    assert (want[1] - base[1]).abs().max() > LEAST_EFFECT
    assert torch.equal(got[0], base[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-12)


def adapter_of(model: nn.Module, site: str) -> Adapter:
    """A random adapter of rank 2 for one site."""
    weight = model.get_submodule(site).get_parameter("weight")
    kernel = (int(weight.shape[2]), int(weight.shape[3])) if weight.dim() == 4 else None
    pair = LoraPair(torch.randn(2, weight[0].numel()), torch.randn(len(weight), 2), 0.5, kernel)
    return Adapter({site: pair})


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
    ],
)
def test_a_conv_that_cannot_carry_a_lora_is_refused(conv, reason):
    model, library = nn.Sequential(conv), Library()
    library.add("a", adapter_of(model, "0"))
    with (
        attach(model, library) as lora,
        pytest.raises(AdapterMismatchError, match=reason),
        lora.rows(["a"]),
    ):
        pass


def test_a_kernel_of_another_shape_is_refused_though_it_has_as_many_values():
    model, library = nn.Sequential(nn.Conv2d(4, 4, (3, 1))), Library()
    library.add("a", adapter_of(nn.Sequential(nn.Conv2d(4, 4, (1, 3))), "0"))
    with (
        attach(model, library) as lora,
        pytest.raises(AdapterMismatchError, match=r"expected a kernel of \(3, 1\), got \(1, 3\)"),
        lora.rows(["a"]),
    ):
        pass


def assert_still_runs(model: nn.Module, lora: object, oracle: Oracle) -> None:
    """After a refusal the next rows are what they should be."""
    inputs = oracle.case.inputs(2, torch.float32)
    base = output_of(model, inputs)
    with lora.rows(["plain", None]):  # type: ignore[attr-defined]
        got = output_of(model, inputs)
    assert (got[0] - base[0]).abs().max() > LEAST_EFFECT
    torch.testing.assert_close(
        got[:1], oracle.expected({"plain": 1.0}, rows_of(inputs, 0, 1)), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(got[1], base[1])


def test_a_batch_of_another_size_is_refused(language_model):
    model, inputs = language_model.base, language_model.case.inputs(3, torch.float32)
    with attach(model, Library(language_model.folder)) as lora:
        with (
            pytest.raises(ConfigError, match=r"batch of 3, but rows\(\) has 2 mixtures; .*copies=2"),
            lora.rows(["plain", None]),
        ):
            output_of(model, inputs)
        with (
            pytest.raises(ConfigError, match="2 mixtures x 2 copies"),
            lora.rows(["plain", None], copies=2),
        ):
            output_of(model, inputs)
        with (
            pytest.raises(ConfigError, match="copies must be at least 1, got 0"),
            lora.rows([None], copies=0),
        ):
            pass
        assert_still_runs(model, lora, language_model)


def test_rows_within_rows_are_refused_and_the_outer_ones_go_on(language_model):
    model, inputs = language_model.base, language_model.case.inputs(1, torch.float32)
    with attach(model, Library(language_model.folder)) as lora:
        with lora.rows(["plain"]):
            want = output_of(model, inputs)
            with pytest.raises(ConfigError, match="open already"), lora.rows(["rslora"]):
                pass
            assert torch.equal(output_of(model, inputs), want)
        assert not torch.equal(output_of(model, inputs), want)
        assert_still_runs(model, lora, language_model)


def test_a_model_that_records_gradients_is_refused(language_model):
    model, inputs = language_model.base, language_model.case.inputs(1, torch.float32)
    with attach(model, Library(language_model.folder)) as lora:
        with pytest.raises(ConfigError, match=r"records gradients.*inference_mode"), lora.rows(["plain"]):
            model(**inputs)
        assert_still_runs(model, lora, language_model)


def test_an_adapter_of_another_model_and_one_that_is_missing_are_refused(language_model):
    model, library = language_model.base, Library(language_model.folder)
    library.add("of another", adapter_of(nn.Sequential(nn.Linear(4, 4)), "0"))
    with attach(model, library) as lora:
        with (
            pytest.raises(AdapterMismatchError, match="LlamaForCausalLM"),
            lora.rows(["plain", "of another"]),
        ):
            pass
        with pytest.raises(AdapterNotFoundError, match="plane"), lora.rows(["rslora", "plane"]):
            pass
        assert_still_runs(model, lora, language_model)


def test_more_adapters_than_the_memory_holds_are_refused_and_fewer_still_run(language_model):
    model = language_model.base
    with attach(model, Library(language_model.folder), memory_bytes=2 * PAGE) as lora:
        with pytest.raises(CapacityError, match="memory_bytes"), lora.rows(["rslora", "pattern", "other"]):
            pass
        assert_still_runs(model, lora, language_model)
    with pytest.raises(ConfigError, match="at least one page"):
        attach(model, Library(), memory_bytes=100)


def test_after_detach_there_are_no_rows(language_model):
    lora = attach(language_model.base, Library(language_model.folder))
    lora.detach()
    with pytest.raises(ConfigError, match="detached"), lora.rows(["plain"]):
        pass


def test_a_model_without_a_site_cannot_be_attached_to():
    with pytest.raises(ConfigError, match="no Linear and no Conv2d"):
        attach(nn.Sequential(nn.LayerNorm(4)), Library())
