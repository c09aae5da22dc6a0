"""Pictures that share a batch are those that each is alone; what fails fails alone; nothing is merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from PIL import Image

from manylora.errors import (
    AdapterMismatchError,
    AdapterNotFoundError,
    CapacityError,
    ConfigError,
    ManyLoraError,
    RequestError,
)
from manylora.image.config import ImageEngineConfig
from manylora.image.engine import ImageEngine
from manylora.image.output import ImageOutput, Picture
from manylora.image.params import ImageParams
from manylora.lifecycle import RequestState
from manylora.lora.library import Library
from manylora.lora.mixture import MixtureLike
from manylora.models.attach import PAGE_BYTES
from manylora.models.diffusion_base import DiffusionBase
from tests.image.pictures import largest_difference, random_adapter

MIXTURES: list[MixtureLike] = [None, "lcm", {"lcm": 1.0, "style": 0.8}, "style:-0.5", "lcm"]


@pytest.fixture(scope="module")
def library(sd: DiffusionBase, sdxl: DiffusionBase) -> Library:
    library = Library()
    library.add("lcm", random_adapter(sd, 1))
    library.add("style", random_adapter(sd, 2, rank=3, text=True))
    library.add("of-sdxl", random_adapter(sdxl, 3))
    return library


@pytest.fixture
def engine(sd: DiffusionBase, library: Library) -> Iterator[ImageEngine]:
    with ImageEngine(sd, library) as engine:
        yield engine


def is_finished(picture: Picture) -> bool:
    return picture.event.state is RequestState.FINISHED and picture.image is not None


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("sampler", ["lcm", "dpm-solver++"])
def test_a_picture_is_the_same_in_any_batch(engine: ImageEngine, sampler: str, guidance: float) -> None:
    prompts = ["a cat", "a cat", "a cat", "two dogs", "a cat"]
    params = [
        ImageParams(sampler=sampler, guidance=guidance + 0.5 * i if guidance > 1 else 1.0, seed=seed)
        for i, seed in enumerate([5, 5, 5, 5, 6])
    ]
    passes: list[int] = []
    together = engine.generate(
        prompts, params, MIXTURES, on_output=lambda output: passes.append(output.num_done)
    )
    assert all(map(is_finished, together))
    # Each picture tells of four steps and of its end.
    assert sorted(passes) == sorted([1, 2, 3, 4, 4] * 5)
    for i, picture in enumerate(together):
        (alone,) = engine.generate([prompts[i]], params[i], [MIXTURES[i]])
        assert largest_difference(alone, picture) <= 1
        for other in together[:i]:
            assert largest_difference(other, picture) > 10, "prompt, seed and mixture matter"


def test_all_pictures_of_a_batch_share_its_passes(
    engine: ImageEngine, sd: DiffusionBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    whole = type(sd.unet).forward

    def counted(unet: object, sample: torch.Tensor, *args: object, **kwargs: object) -> object:
        rows.append(len(sample))
        return whole(unet, sample, *args, **kwargs)

    monkeypatch.setattr(type(sd.unet), "forward", counted)
    engine.generate(["a cat"] * 3, ImageParams(steps=2, seed=1), MIXTURES[:3])
    assert rows == [3, 3]
    rows.clear()
    engine.generate(["a cat"] * 3, ImageParams(steps=2, seed=1, guidance=2.0), MIXTURES[:3])
    assert rows == [6, 6]


def test_what_cannot_share_a_batch_runs_in_several(engine: ImageEngine) -> None:
    params = [
        ImageParams(seed=1),
        ImageParams(seed=1, steps=2),
        ImageParams(seed=1, width=24),
        ImageParams(seed=1, sampler="ddim"),
        ImageParams(seed=1, guidance=2.0),
    ]
    pictures = engine.generate(["a cat"] * 5, params)
    assert all(map(is_finished, pictures))
    for one, picture in zip(params, pictures, strict=True):
        assert largest_difference(engine.generate(["a cat"], one)[0], picture) <= 1


def test_more_pictures_than_a_batch_holds(sd: DiffusionBase, library: Library, engine: ImageEngine) -> None:
    with ImageEngine(sd, library, ImageEngineConfig(max_batch=2)) as small:
        pictures = small.generate(["a cat"] * 5, ImageParams(seed=1, steps=2), MIXTURES)
    wanted = engine.generate(["a cat"] * 5, ImageParams(seed=1, steps=2), MIXTURES)
    for picture, other in zip(pictures, wanted, strict=True):
        assert largest_difference(picture, other) <= 1


def test_n_pictures_have_seeds_that_follow_one_another(engine: ImageEngine) -> None:
    pictures = engine.generate(["a cat"], ImageParams(seed=7, n=3))
    assert [(picture.index, picture.params.seed) for picture in pictures] == [(0, 7), (1, 8), (2, 9)]
    (alone,) = engine.generate(["a cat"], ImageParams(seed=8))
    assert largest_difference(alone, pictures[1]) <= 1
    assert largest_difference(pictures[0], pictures[1]) > 10


def test_without_a_seed_each_request_has_a_new_one_that_makes_it_again(engine: ImageEngine) -> None:
    one, other = engine.generate(["a cat"] * 2)
    assert one.params.seed != other.params.seed
    (again,) = engine.generate(["a cat"], ImageParams(seed=one.params.seed))
    assert largest_difference(one, again) <= 1


def test_the_base_is_never_touched(sd: DiffusionBase, library: Library) -> None:
    before = {name: tensor.clone() for name, tensor in sd.unet.state_dict().items()}
    z, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    denoise = sd.denoiser(sd.encode_prompts(["a cat"]))
    with torch.inference_mode():
        wanted = denoise(z, t).x0
        with ImageEngine(sd, library) as engine:
            engine.generate(["a cat"], ImageParams(seed=1), [{"lcm": 1.0, "style": 1.0}])
        assert torch.equal(denoise(z, t).x0, wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sd.unet.state_dict().items())


BAD: list[tuple[MixtureLike, ImageParams, type[ManyLoraError], list[str]]] = [
    ("of-sdxl", ImageParams(seed=1), AdapterMismatchError, ["random-3", "/sd'"]),
    ("lmc", ImageParams(seed=1), AdapterNotFoundError, ["'lmc'", "Did you mean 'lcm'"]),
    ({"lcm": float("nan")}, ImageParams(seed=1), RequestError, ["'lcm'", "finite", "nan"]),
    ({"lcm": 1e30}, ImageParams(seed=1), RequestError, ["latent at step", "lcm:1e30", "lower"]),
    (
        None,
        ImageParams(guidance=2.0, negative_prompt="red " * 90),
        RequestError,
        ["24 tokens", "/sd'", "red red"],
    ),
    (None, ImageParams(width=17), RequestError, ["width", "multiple of 2", "17", "16 or 18"]),
    (None, ImageParams(strength=0.5), RequestError, ["strength", "picture to start from"]),
    (None, ImageParams(steps=51), RequestError, ["steps", "50", "51"]),
    (None, ImageParams(original_steps=1001), RequestError, ["original_steps", "1000", "1001"]),
    (None, ImageParams(steps=1001, sampler="ddim"), RequestError, ["steps", "1000", "1001"]),
]


@pytest.mark.parametrize(("mixture", "params", "kind", "says"), BAD)
def test_one_bad_picture_leaves_the_others_unharmed(
    engine: ImageEngine,
    mixture: MixtureLike,
    params: ImageParams,
    kind: type[ManyLoraError],
    says: list[str],
) -> None:
    good = ImageParams(seed=1)
    wanted = engine.generate(["a cat"] * 2, good, ["lcm", "style"])
    first, bad, last = engine.generate(["a cat"] * 3, [good, params, good], ["lcm", mixture, "style"])
    assert type(bad.error) is kind
    assert bad.image is None
    assert all(word in str(bad.error) for word in says), bad.error
    assert largest_difference(first, wanted[0]) <= 1
    assert largest_difference(last, wanted[1]) <= 1
    assert not engine.has_work()
    both = engine.generate(["a cat"], replace(params, n=2), [mixture])
    assert [(picture.index, type(picture.error)) for picture in both] == [(0, kind), (1, kind)]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sampler": "lmc"}, "lcm, ddim"),
        ({"steps": 0}, "at least 1, got 0"),
        ({"steps": 2.0}, "an integer"),
        ({"strength": 0.0}, "above 0 and at most 1, got 0.0"),
        ({"strength": 1.01}, "above 0 and at most 1"),
        ({"strength": float("nan")}, "above 0"),
        ({"guidance": 0.5}, "from 1 (off)"),
        ({"guidance": float("inf")}, "from 1 (off)"),
        ({"negative_prompt": "blurred"}, "no effect"),
        ({"seed": -1}, "seed"),
        ({"n": True}, "an integer"),
        ({"original_steps": 0}, "at least 1, got 0"),
        ({"sampler": "ddim", "original_steps": 40}, "no effect on samplers other than lcm"),
        ({"cfg": 2}, "unknown image parameters ['cfg']"),
    ],
)
def test_a_wrong_parameter_is_named(values: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError) as refused:
        ImageParams.from_dict(values)
    assert says in str(refused.value)


def test_strength_that_leaves_too_few_steps_is_refused(engine: ImageEngine) -> None:
    start = Image.new("RGB", (16, 16))
    with pytest.raises(RequestError, match=r"\[1, 5\].*got 8"):
        engine.submit("a cat", ImageParams(steps=8, strength=0.1), image=start)


def test_adapters_that_fit_only_one_after_another(sd: DiffusionBase, library: Library) -> None:
    num_pages = [-(-library.load(name).num_bytes // PAGE_BYTES) for name in ("lcm", "style")]
    room = ImageEngineConfig(adapter_bytes=max(num_pages) * PAGE_BYTES)
    with ImageEngine(sd, library, room) as engine:
        one, both, other = engine.generate(
            ["a cat"] * 3, ImageParams(seed=1), ["lcm", "lcm+style", "style"]
        )
        assert isinstance(both.error, CapacityError)
        assert is_finished(one)
        assert is_finished(other)
    with ImageEngine(sd, library) as roomy:
        wanted = roomy.generate(["a cat"] * 2, ImageParams(seed=1), ["lcm", "style"])
    assert largest_difference(one, wanted[0]) <= 1
    assert largest_difference(other, wanted[1]) <= 1


def outputs_of(engine: ImageEngine, num_steps: int | None = None) -> list[ImageOutput]:
    outputs: list[ImageOutput] = []
    while engine.has_work() and (num_steps is None or num_steps > 0):
        outputs += engine.step()
        num_steps = None if num_steps is None else num_steps - 1
    return outputs


def test_a_cancelled_picture_ends_at_the_next_step(engine: ImageEngine) -> None:
    ids = [engine.submit("a cat", ImageParams(seed=1), "lcm") for _ in range(2)]
    outputs_of(engine, num_steps=2)
    engine.cancel(ids[0])
    engine.cancel("nobody")
    outputs = outputs_of(engine)
    ended = {output.request_id: output.picture for output in outputs if output.picture is not None}
    first, second = ended[ids[0]], ended[ids[1]]
    assert first is not None
    assert first.event.state is RequestState.CANCELLED
    assert second is not None
    (wanted,) = engine.generate(["a cat"], ImageParams(seed=1), ["lcm"])
    assert largest_difference(second, wanted) <= 1


def test_a_batch_whose_pictures_are_all_cancelled_ends(engine: ImageEngine) -> None:
    running = engine.submit("a cat", ImageParams(seed=1), "lcm")
    engine.step()
    waiting = engine.submit("a cat", ImageParams(seed=1, steps=2), "style")
    engine.cancel(running)
    engine.cancel(waiting)
    states = [output.picture.event.state for output in engine.step() if output.picture is not None]
    assert states == [RequestState.CANCELLED] * 2
    assert not engine.has_work()
    assert is_finished(engine.generate(["a cat"], ImageParams(seed=1))[0])


def test_an_engine_outlives_a_pass_that_breaks(
    engine: ImageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(self: object, latents: object) -> None:
        raise MemoryError("no memory left")

    monkeypatch.setattr(DiffusionBase, "decode_latents", break_off)
    with pytest.raises(MemoryError):
        engine.generate(["a cat"], ImageParams(seed=1), ["lcm"])
    monkeypatch.undo()
    assert not engine.has_work()
    assert is_finished(engine.generate(["a cat"], ImageParams(seed=1), ["lcm"])[0])


def test_generate_returns_its_own_pictures_and_no_others(engine: ImageEngine) -> None:
    """It counted a picture that was submitted before as one of its own, and ended too early."""
    engine.submit("two dogs", ImageParams(seed=1, steps=2), request_id="mine")
    told: list[ImageOutput] = []
    (picture,) = engine.generate(["a cat"], ImageParams(seed=1), on_output=told.append)
    assert picture.prompt == "a cat"
    assert is_finished(picture)
    assert {output.request_id for output in told} == {picture.request_id}
    assert not engine.has_work(), "the steps were for both"


def test_a_call_that_breaks_leaves_none_of_its_pictures_to_be_made(
    sd: DiffusionBase, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those of the batch that broke were ended; the caller's next try made the others too."""

    def break_off(self: object, latents: object) -> None:
        raise MemoryError("no memory left")

    with ImageEngine(sd, library, ImageEngineConfig(max_batch=1)) as engine:
        monkeypatch.setattr(DiffusionBase, "decode_latents", break_off)
        with pytest.raises(MemoryError):
            engine.generate(
                ["a cat"] * 3, [ImageParams(seed=1), ImageParams(width=17), ImageParams(seed=1)]
            )
        monkeypatch.undo()
        assert not engine.has_work()
        assert is_finished(engine.generate(["a cat"], ImageParams(seed=1), ["lcm"])[0])


def test_a_call_that_breaks_leaves_the_pictures_of_others(engine: ImageEngine) -> None:
    def break_off(output: ImageOutput) -> None:
        engine.submit("two dogs", ImageParams(seed=1), "lcm", request_id="mine")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(
            ["a cat"] * 2, [ImageParams(seed=1), ImageParams(seed=1, steps=2)], on_output=break_off
        )
    assert engine.has_work()
    outputs = outputs_of(engine)
    assert {output.request_id for output in outputs} == {"mine"}
    assert outputs[-1].picture is not None
    assert is_finished(outputs[-1].picture)


def test_prompts_are_measured_while_steps_encode_others(engine: ImageEngine, sd: DiffusionBase) -> None:
    """A tokenizer keeps the padding and truncation of its last call: both sides switched them under each other."""
    measured: list[BaseException | str] = []
    is_over = Event()

    def submit() -> None:
        while not is_over.is_set():
            try:
                measured.append(engine.submit("red " * 90))
            except Exception as error:
                measured.append(error)

    threads = [Thread(target=submit) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        while len(measured) < 500:
            sd.encode_prompts(["a cat", "a cat and two dogs"])
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert {type(result) for result in measured} == {RequestError}


def test_two_requests_cannot_have_one_id(engine: ImageEngine) -> None:
    engine.submit("a cat", request_id="mine")
    with pytest.raises(RequestError, match="'mine' is being served"):
        engine.submit("a dog", request_id="mine")
    outputs_of(engine)
    engine.submit("a dog", request_id="mine")
    outputs_of(engine)


def test_lists_that_do_not_match_are_refused(engine: ImageEngine) -> None:
    with pytest.raises(ConfigError, match="2 prompts, 2 params, 1 mixtures"):
        engine.generate(["a", "b"], ImageParams(), ["lcm"])
    assert not Path("pictures").exists()


def test_a_picture_says_which_content_its_names_meant(engine: ImageEngine, library: Library) -> None:
    (picture,) = engine.generate(["a cat"], ImageParams(seed=1), ["lcm:0.5"])
    assert picture.adapters == {"lcm": library.load("lcm").identity}
    assert picture.settings["lora"] == {"lcm": 0.5}
    assert picture.settings["original_steps"] == 50
    (picture,) = engine.generate(["a cat"], ImageParams(seed=1, sampler="ddim"))
    assert "original_steps" not in picture.settings
