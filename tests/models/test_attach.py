"""attach against PEFT: each row of a batch is what PEFT gives for that row alone; the base is never touched."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manylora.errors import (
    AdapterMismatchError,
    AdapterNotFoundError,
    CapacityError,
    ConfigError,
    RequestError,
)
from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.library import Library
from manylora.lora.mixture import MixtureLike
from manylora.models.attach import attach
from tests.models.attached import CASES, Trained, relative_error

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(CASES[request.param], tmp_path_factory.mktemp(request.param))


def mixtures_of(trained: Trained) -> list[MixtureLike]:
    a, b, c, d = trained.case.adapters
    mixed: list[MixtureLike] = [
        {a: 1.0, b: -0.5},
        {b: 1.5, c: 0.75, d: -0.25},
        {d: 0.5},
        {a: 0.5, b: 0.5, c: 0.5, d: 1.5},
    ]
    return [a, None, b, mixed[0], c, d, a, *mixed[1:3], None, mixed[3], f"{b}:1.25"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_row_is_what_peft_gives_for_it_alone(trained: Trained, dtype: torch.dtype) -> None:
    mixtures = mixtures_of(trained)
    inputs, model = trained.inputs(len(mixtures), dtype), trained.base(dtype)
    base = trained.run(model, inputs)
    with attach(model, Library(trained.folder)) as lora, lora.rows(mixtures):
        got = trained.run(model, inputs)
    for row, mixture in enumerate(mixtures):
        want = trained.expected_row(inputs, row, mixture, dtype)
        if mixture is None:
            # The same products in the same batch, to which nothing was added: not a bit may differ.
            assert torch.equal(got[row], base[row])
        else:
            assert relative_error(want, base[row]) > 0.02, f"{mixture} does nothing"
        assert relative_error(got[row], want[0]) < TOLERANCE[dtype], f"row {row}: {mixture}"


def test_every_adapter_of_the_table_changes_the_output_in_its_own_way(trained: Trained) -> None:
    inputs = trained.inputs(1, torch.float64)
    outputs = [
        trained.expected_row(inputs, 0, mixture, torch.float64)
        for mixture in [None, *trained.case.adapters]
    ]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert relative_error(one, other) > 0.02


def test_guidance_that_doubles_the_batch(trained: Trained) -> None:
    """As [unconditional, conditional] in one batch: row i and row N + i have mixture i."""
    mixtures = mixtures_of(trained)
    N, model = len(mixtures), trained.base(torch.float64)
    inputs = trained.inputs(2 * N, torch.float64)
    base = trained.run(model, inputs)
    with attach(model, Library(trained.folder)) as lora:
        with lora.rows(mixtures, copies=2):
            got = trained.run(model, inputs)
        with lora.rows(mixtures), pytest.raises(ConfigError) as refusal:
            trained.run(model, inputs)
        with lora.rows(mixtures[:3], copies=2), pytest.raises(ConfigError, match="3 mixtures x 2 copies"):
            trained.run(model, inputs)
    for row in range(2 * N):
        mixture = mixtures[row % N]
        if mixture is None:
            assert torch.equal(got[row], base[row])
        want = trained.expected_row(inputs, row, mixture, torch.float64)
        assert relative_error(got[row], want[0]) < 1e-12
    assert (
        f"was given a batch of {2 * N}, but rows() has {N} mixtures; if the model runs the batch several"
        in str(refusal.value)
    )


def digest(model: nn.Module) -> str:
    """Of the bytes of every parameter and buffer, with its name."""
    total = hashlib.blake2b()
    for name, tensor in model.state_dict().items():
        total.update(
            name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return total.hexdigest()


def test_the_digest_sees_a_single_bit(trained: Trained) -> None:
    model = copy.deepcopy(trained.base(torch.float32))
    before = digest(model)
    next(model.parameters()).data.view(torch.int32).view(-1)[-1] ^= 1
    assert digest(model) != before


def test_a_thousand_random_swaps_leave_the_base_as_it_was(trained: Trained) -> None:
    model = trained.base(torch.float32)
    inputs = {key: x[:, :2] if x.dim() == 2 else x for key, x in trained.inputs(2).items()}
    before, base = digest(model), trained.run(model, inputs)
    names, chance = list(trained.case.adapters), Random(0)
    lora = attach(model, Library(trained.folder), memory_bytes=3 << 16)
    num_runs = 0
    for swap in range(1000):
        fitting = chance.sample(names, 3)  # a page each
        mixtures = [
            {name: chance.uniform(-0.5, 1.5) for name in chance.sample(fitting, chance.randint(0, 2))}
            for _ in range(2)
        ]
        with lora.rows(mixtures):
            if swap % 50 == 0 and any(mixtures):
                assert not torch.equal(trained.run(model, inputs), base)
                num_runs += 1
    assert num_runs > 10
    assert lora._memory.adapters.stats.evictions > 100
    assert digest(model) == before
    assert torch.equal(trained.run(model, inputs), base)
    with lora.rows([None, None]):
        assert torch.equal(trained.run(model, inputs), base)
    lora.detach()
    assert torch.equal(trained.run(model, inputs), base)
    assert not any(module._forward_hooks for module in model.modules())


# -- one small module, for what does not hang on the kind of model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(input=torch.tanh(self.first(x)))
        return y


def adapter(
    sites: dict[str, tuple[int, int]], *, rank: int = 2, seed: int = 0, kernel: Any = None
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            site: LoraPair(
                torch.randn(rank, d, generator=generator),
                torch.randn(o, rank, generator=generator),
                0.5,
                kernel,
            )
            for site, (d, o) in sites.items()
        },
        name=f"seed {seed}",
    )


BOTH = {"first": (6, 8), "second": (8, 5)}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def library() -> Library:
    library = Library()
    for seed, name in enumerate("abcdef"):
        library.add(name, adapter(BOTH, seed=seed, rank=1 + seed))
    return library


@pytest.fixture(autouse=True)
def _no_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    if "gradients" in request.node.name:
        yield
        return
    with torch.no_grad():
        yield


def merged(net: nn.Module, found: Adapter, x: Tensor, weight: float = 1.0) -> Tensor:
    """What the module gives with the adapter added to its weights."""
    net = copy.deepcopy(net)
    for module in net.modules():
        module._forward_hooks.clear()  # it may be asked for while rows are open
    for site, pair in found.sites.items():
        base = net.get_submodule(site).weight
        assert isinstance(base, Tensor)
        base.data += weight * pair.delta(torch.float32).view_as(base)
    result: Tensor = net(x)
    return result


def test_a_module_called_with_its_input_by_name(net: Net, library: Library) -> None:
    x = torch.randn(3, 6)
    want = merged(net, library.load("c"), x)
    with attach(net, library) as lora, lora.rows(["c"] * 3):
        torch.testing.assert_close(net(x), want)
    assert relative_error(want, net(x)) > 0.1


@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6), (3, 2, 5, 6), (3, 0, 6), (0, 6)])
def test_any_number_of_positions_in_a_row(net: Net, library: Library, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    names = ["a", None, "f"][: shape[0]]
    with attach(net, library) as lora, lora.rows(names):
        got = net(x)
    assert got.shape == (*shape[:-1], 5)
    for row, name in enumerate(names):
        want = net(x[row]) if name is None else merged(net, library.load(name), x[row])
        torch.testing.assert_close(got[row], want)


def test_an_input_that_is_no_batch_is_refused(net: Net, library: Library) -> None:
    with (
        attach(net, library) as lora,
        lora.rows(["a"] * 6),
        pytest.raises(ConfigError, match="batch dimension"),
    ):
        net(torch.randn(6))


def test_what_is_evicted_and_loaded_again_gives_the_same(net: Net, library: Library) -> None:
    x = torch.randn(1, 6)
    wants = {name: merged(net, library.load(name), x) for name in "abcdef"}
    with attach(net, library, memory_bytes=2 << 16) as lora:
        for name in "abcdefabcdefafbe":
            with lora.rows([name]):
                torch.testing.assert_close(net(x), wants[name])
        stats = lora._memory.adapters.stats
        assert (stats.loads, stats.evictions) == (15, 13), "only the second f was still there"
        lora._memory.check_integrity()


def test_an_adapter_that_could_not_be_written_takes_no_pages(
    net: Net, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(1, 6)
    want = merged(net, library.load("a"), x)

    def no_memory(*_: object) -> None:
        raise MemoryError

    with attach(net, library, memory_bytes=2 << 16) as lora:
        with monkeypatch.context() as patch:
            patch.setattr(lora._pages, "write", no_memory)
            for _ in range(3):
                with pytest.raises(MemoryError), lora.rows(["a"]):
                    raise AssertionError("never reached")
        assert lora._memory.num_free == 2
        with lora.rows(["a"]):
            torch.testing.assert_close(net(x), want)


def test_each_of_a_thousand_swaps_changes_its_row_and_no_other(net: Net, library: Library) -> None:
    x, chance = torch.randn(2, 6), Random(0)
    base = net(x)
    with attach(
        net, library, memory_bytes=3 << 16
    ) as lora:  # half of the adapters, so they are evicted too
        for _ in range(1000):
            names = chance.sample("abcdef", chance.randint(1, 3))
            with lora.rows([{name: chance.uniform(0.1, 1.5) for name in names}, None]):
                swapped = net(x)
            assert not torch.equal(swapped[0], base[0])
            assert torch.equal(swapped[1], base[1])
        assert torch.equal(net(x), base), "attached, but no rows are open"


def test_adapters_that_do_not_fit_together_are_refused_and_the_rest_goes_on(
    net: Net, library: Library
) -> None:
    x = torch.randn(3, 6)
    with attach(net, library, memory_bytes=2 << 16) as lora:
        with pytest.raises(CapacityError) as refusal, lora.rows(["a", "b", "c"]):
            raise AssertionError("never reached")
        message = str(refusal.value)
        assert "takes 1 pages of 65536 bytes" in message
        assert "only 0 of 2 can be had; give attach() more memory_bytes" in message
        assert lora._memory.adapters.num_evictable_pages == 2, (
            "the adapters of the refused rows are still held"
        )
        with lora.rows(["c", "d", "c"]):
            torch.testing.assert_close(net(x)[1], merged(net, library.load("d"), x)[1])


def test_bad_requests_are_refused_and_harm_nobody(net: Net, library: Library) -> None:
    library.add("other model", adapter({"third": (6, 8)}))
    library.add("other size", adapter({"first": (6, 9)}))
    x = torch.randn(1, 6)
    with attach(net, library) as lora:
        for mixture, error, match in (
            ("other model", AdapterMismatchError, "fits no module of 'Net'"),
            ("other size", AdapterMismatchError, "expected in 6, out 8, got in 6, out 9"),
            ("nobody", AdapterNotFoundError, "nobody"),
            ({"a": float("nan")}, RequestError, "a"),
            ([("a", 1.0), ("a", 2.0)], RequestError, "twice"),
        ):
            with pytest.raises(error, match=match), lora.rows(["a", mixture]):
                raise AssertionError("never reached")
            with lora.rows(["a"]):
                torch.testing.assert_close(net(x), merged(net, library.load("a"), x))
        with (
            pytest.raises(ConfigError, match="copies must be at least 1, got 0"),
            lora.rows(["a"], copies=0),
        ):
            pass


def test_rows_within_rows_and_after_detach_are_refused(net: Net, library: Library) -> None:
    x = torch.randn(1, 6)
    with attach(net, library) as lora:
        with lora.rows(["a"]):
            with pytest.raises(ConfigError, match="open already"), lora.rows(["b"]):
                pass
            torch.testing.assert_close(net(x), merged(net, library.load("a"), x))
        with pytest.raises(KeyError, match="mine"), lora.rows(["a"]):
            raise KeyError("mine")
        with lora.rows(["b"]):
            torch.testing.assert_close(net(x), merged(net, library.load("b"), x))
    with pytest.raises(ConfigError, match="detached"), lora.rows(["a"]):
        pass


def test_gradients_are_refused(net: Net, library: Library) -> None:
    x = torch.randn(1, 6)
    with (
        attach(net, library) as lora,
        lora.rows(["a"]),
        pytest.raises(ConfigError, match="records gradients"),
    ):
        net(x)


def test_a_name_pointed_elsewhere_counts_from_the_next_rows_on(net: Net, library: Library) -> None:
    library.add("name", adapter(BOTH, seed=0, rank=1))
    x = torch.randn(1, 6)
    with attach(net, library) as lora:
        with lora.rows(["name"]):
            library.point("name", "b")
            torch.testing.assert_close(net(x), merged(net, library.load("a"), x))
        with lora.rows(["name"]):
            torch.testing.assert_close(net(x), merged(net, library.load("b"), x))
        assert lora._memory.adapters.stats.loads == 2


def test_two_names_of_one_content_are_loaded_once_and_their_weights_add(net: Net, library: Library) -> None:
    library.add("twin", adapter(BOTH, seed=0, rank=1))
    x = torch.randn(1, 6)
    with attach(net, library) as lora, lora.rows([{"a": 0.25, "twin": 0.5}]):
        torch.testing.assert_close(net(x), merged(net, library.load("a"), x, 0.75))
        assert lora._memory.adapters.stats.loads == 1


def test_a_bfloat16_model_is_as_near_as_bfloat16_allows(net: Net, library: Library) -> None:
    x = torch.randn(4, 3, 6)
    want = torch.stack([merged(net, library.load(name), x[i]) for i, name in enumerate("cdef")])
    half = Net().eval()
    half.load_state_dict(net.state_dict())
    half.bfloat16()
    with attach(half, library) as lora, lora.rows(list("cdef")):
        got = half(x.bfloat16())
    assert got.dtype == torch.bfloat16
    # A few roundings to 8 bits, two layers deep.
    assert relative_error(got, want) < 0.05
    assert relative_error(half(x.bfloat16()), want) > 0.5


def test_under_autocast_outputs_are_of_another_dtype_than_inputs(net: Net, library: Library) -> None:
    x = torch.randn(4, 3, 6)
    want = torch.stack([merged(net, library.load(name), x[i]) for i, name in enumerate("cdef")])
    with torch.autocast("cpu", torch.bfloat16):
        base = net(x)
        with attach(net, library) as lora, lora.rows(list("cdef")):
            got = net(x)
    assert (x.dtype, got.dtype) == (torch.float32, torch.bfloat16)
    assert relative_error(got, want) < 0.05
    assert relative_error(base, want) > 0.5


CONVS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "uneven": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1), "dilation": (2, 1)},
    "stride and padding that differ by side": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2)},
    "same, even kernel": {"kernel_size": (2, 4), "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "1x1 with stride": {"kernel_size": 1, "stride": 2},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", CONVS)
def test_convolutions_of_any_geometry(name: str) -> None:
    """The merged kernel is the judge: PEFT's own forward pass leaves the dilation out."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, **CONVS[name])
    net = nn.Sequential(conv)
    height, width = conv.kernel_size
    found = adapter({"0": (3 * height * width, 4)}, kernel=(height, width))
    library = Library()
    library.add("a", found)
    x = torch.randn(3, 3, 9, 8).to(memory_format=torch.channels_last)
    with attach(net, library) as lora, lora.rows([{"a": -0.5}, None, "a"]):
        got = net(x)
    assert relative_error(merged(net, found, x), net(x)) > 0.1
    torch.testing.assert_close(got[0], merged(net, found, x, -0.5)[0])
    assert torch.equal(got[1], net(x)[1])
    torch.testing.assert_close(got[2], merged(net, found, x)[2])


def test_convolutions_that_cannot_carry_a_lora_are_refused() -> None:
    for conv, reason in (
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
    ):
        library = Library()
        library.add("a", adapter({"0": (2 * 9, 4)}, kernel=(3, 3)))
        with (
            pytest.raises(AdapterMismatchError, match=reason),
            attach(nn.Sequential(conv), library).rows(["a"]),
        ):
            pass


def test_a_kernel_of_another_form_is_refused() -> None:
    library = Library()
    library.add("a", adapter({"0": (2 * 9, 4)}, kernel=(1, 9)))
    library.add("flat", adapter({"0": (2 * 9, 4)}))
    lora = attach(nn.Sequential(nn.Conv2d(2, 4, 3)), library)
    for name, got in (("a", r"\(1, 9\)"), ("flat", "None")):
        with (
            pytest.raises(AdapterMismatchError, match=rf"expected a kernel of \(3, 3\), got {got}"),
            lora.rows([name]),
        ):
            pass


def test_a_projection_whose_weights_alone_are_used_is_no_site() -> None:
    """MultiheadAttention never calls its out_proj, so no hook would see it run: the adapter would do nothing."""
    net = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(8, 2, batch_first=True), "after": nn.Linear(8, 8)}
    )
    library = Library()
    library.add("a", adapter({"attention.out_proj": (8, 8)}))
    lora = attach(net, library)
    assert lora.sites == ("after",)
    with pytest.raises(AdapterMismatchError, match=r"attention\.out_proj"), lora.rows(["a"]):
        pass


def test_models_and_memories_that_cannot_be_used_are_refused(net: Net, library: Library) -> None:
    with pytest.raises(ConfigError, match="has no Linear and no Conv2d"):
        attach(nn.Sequential(nn.Tanh()), library)
    with pytest.raises(ConfigError, match="at least one page of 65536 bytes, got 1000"):
        attach(net, library, memory_bytes=1000)


def test_a_rank_row_longer_than_a_usual_page_has_a_page_of_its_size() -> None:
    wide = nn.Sequential(nn.Linear(20_000, 3))
    found = adapter({"0": (20_000, 3)})
    library = Library()
    library.add("a", found)
    x = torch.randn(2, 20_000) / 140
    with attach(wide, library, memory_bytes=1 << 20) as lora, lora.rows(["a", None]):
        torch.testing.assert_close(wide(x)[0], merged(wide, found, x)[0], rtol=1e-4, atol=1e-4)
