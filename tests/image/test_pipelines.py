"""Our pictures are those of diffusers' pipelines: same seed, float32, at most one of 255 apart."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

from manylora.image.engine import ImageEngine
from manylora.image.output import Picture
from manylora.image.params import SAMPLERS, ImageParams
from manylora.image.sampler import timesteps_of
from manylora.lora.components import components
from manylora.lora.convert import save_adapter
from manylora.lora.library import Library
from manylora.models.diffusion_base import DiffusionBase
from tests.image.pictures import largest_difference, random_adapter

# diffusers hands tensors to numpy in a way that numpy 2 has announced to end.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # diffusers loads a second LoRA through PEFT, which warns of a second LoRA.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]

PROMPTS = ["a cat", "two dogs"]
SEEDS = (3, 11)

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lcm": (LCMScheduler, {}),
    "ddim": (DDIMScheduler, {"set_alpha_to_one": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpm-solver++": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}


@cache
def loaded(folder: Path, from_image: bool) -> Any:
    kinds = {
        ("sd", False): StableDiffusionPipeline,
        ("sd", True): StableDiffusionImg2ImgPipeline,
        ("sdxl", False): StableDiffusionXLPipeline,
        ("sdxl", True): StableDiffusionXLImg2ImgPipeline,
    }
    kind = kinds[folder.name, from_image]
    extra: dict[str, Any] = {"safety_checker": None} if folder.name == "sd" else {}
    made = kind.from_pretrained(folder, local_files_only=True, **extra)
    made.set_progress_bar_config(disable=True)
    return made


def pipeline(folder: Path, sampler: str, *, from_image: bool = False, fresh: bool = False) -> Any:
    """diffusers' pipeline with a sampler.

    Args:
        fresh: for those who change it.
    """
    made = (loaded.__wrapped__ if fresh else loaded)(folder, from_image)
    scheduler, settings = SCHEDULERS[sampler]
    config = scheduler.load_config(folder / "scheduler")
    made.scheduler = scheduler.from_config(
        config, timestep_spacing="trailing", clip_sample=False, **settings
    )
    return made


def theirs(pipe: Any, params: ImageParams, **given: Any) -> list[Image.Image]:
    images: list[Image.Image] = pipe(
        PROMPTS,
        num_inference_steps=params.steps,
        guidance_scale=params.guidance,
        negative_prompt=None if params.negative_prompt is None else [params.negative_prompt] * len(PROMPTS),
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        **given,
    ).images
    return images


def ours(
    base: DiffusionBase,
    settings: Mapping[str, Any],
    library: Library | None = None,
    mixture: Mapping[str, float] | None = None,
    image: Image.Image | None = None,
) -> list[Picture]:
    with ImageEngine(base, library or Library()) as engine:
        pictures = engine.generate(
            PROMPTS,
            [ImageParams(**settings, seed=seed) for seed in SEEDS],
            [mixture] * len(PROMPTS),
            [image] * len(PROMPTS),
        )
    for picture in pictures:
        assert picture.error is None, picture.error
    return pictures


def assert_same(found: list[Picture], wanted: list[Image.Image]) -> None:
    assert largest_difference(wanted[0], wanted[1]) > 20, "the pictures differ from each other"
    for mine, other in zip(found, wanted, strict=True):
        assert largest_difference(mine, other) <= 1


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_from_noise(kind: str, sampler: str, guidance: float, request: pytest.FixtureRequest) -> None:
    base, folder = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_folder")
    settings = {"sampler": sampler, "steps": 4, "guidance": guidance, "width": 24, "height": 16}
    params = ImageParams(**settings)  # type: ignore[arg-type]
    wanted = theirs(pipeline(folder, sampler), params, width=24, height=16)
    found = ours(base, settings)
    assert found[0].image is not None
    assert found[0].image.size == (24, 16)
    assert_same(found, wanted)
    if guidance > 1:
        unguided = ours(base, {**settings, "guidance": 1.0})
        assert largest_difference(found[0], unguided[0]) > 5, "guidance changes the picture"


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_negative_prompt(kind: str, request: pytest.FixtureRequest) -> None:
    base, folder = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_folder")
    settings: dict[str, Any] = {"sampler": "ddim", "steps": 4, "guidance": 4.0}
    found = ours(base, {**settings, "negative_prompt": "blurred"})
    params = ImageParams(**settings, negative_prompt="blurred")
    assert_same(found, theirs(pipeline(folder, "ddim"), params))
    none, empty = ours(base, settings), ours(base, {**settings, "negative_prompt": ""})
    assert largest_difference(found[0], none[0]) > 2, "the negative prompt changes the picture"
    # SDXL takes no negative prompt at all for zeros, SD for the empty text.
    assert (largest_difference(none[0], empty[0]) > 0) == (kind == "sdxl")
    assert_same(empty, theirs(pipeline(folder, "ddim"), ImageParams(**settings, negative_prompt="")))


@pytest.mark.parametrize("sampler", ["lcm", "ddim", "dpm-solver++"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_with_loras_on_unet_and_text_encoders(
    kind: str, sampler: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base, folder = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_folder")
    loras = {"lcm": (random_adapter(base, 1), 1.0), "style": (random_adapter(base, 2, text=True), 0.8)}
    pipe, library = pipeline(folder, sampler, fresh=True), Library(tmp_path)
    for name, (adapter, _) in loras.items():
        save_adapter(adapter, tmp_path / f"{name}.safetensors", "diffusers")
        pipe.load_lora_weights(str(tmp_path), weight_name=f"{name}.safetensors", adapter_name=name)
    weights = {name: weight for name, (_, weight) in loras.items()}
    pipe.set_adapters(list(weights), list(weights.values()))
    settings = {"sampler": sampler, "steps": 4, "guidance": 1.5}
    found = ours(base, settings, library, weights)
    assert_same(found, theirs(pipe, ImageParams(**settings)))  # type: ignore[arg-type]
    library.add("unet-of-style", components(loras["style"][0])["unet"])
    without_text = ours(base, settings, library, {"lcm": 1.0, "unet-of-style": 0.8})
    assert largest_difference(found[0], without_text[0]) > 5, "its text encoders' part changes the picture"
    for lacking in weights:
        without = {name: weight for name, weight in weights.items() if name != lacking}
        other = ours(base, settings, library, without)
        assert largest_difference(found[0], other[0]) > 10, f"{lacking} changes the picture"


def photo(width: int, height: int) -> Image.Image:
    ramp = torch.linspace(0, 255, width).expand(height, width)
    stack = torch.stack([ramp, ramp.flip(1), torch.full_like(ramp, 90)], dim=-1)
    return Image.fromarray(stack.to(torch.uint8).numpy())


@pytest.mark.parametrize(
    ("kind", "sampler", "strength"),
    [
        ("sd", "ddim", 0.5),
        ("sd", "dpm-solver++", 0.5),
        ("sd", "dpm-solver++", 1.0),
        ("sd", "euler", 0.5),
        ("sd", "unipc", 0.75),
        ("sdxl", "ddim", 0.75),
        ("sdxl", "unipc", 0.5),
    ],
)
def test_from_a_picture(kind: str, sampler: str, strength: float, request: pytest.FixtureRequest) -> None:
    base, folder = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_folder")
    settings = {"sampler": sampler, "steps": 4, "guidance": 2.0, "strength": strength}
    start = photo(24, 16)
    wanted = theirs(
        pipeline(folder, sampler, from_image=True),
        ImageParams(**settings),  # type: ignore[arg-type]
        image=[start] * len(PROMPTS),
        strength=strength,
    )
    found = ours(base, settings, image=start)
    assert_same(found, wanted)
    assert found[0].image is not None
    assert found[0].image.size == (24, 16)
    other = ours(base, settings, image=photo(24, 16).rotate(180))
    assert largest_difference(found[0], other[0]) > (5 if strength < 1 else 2), "where it starts matters"


def test_lcm_asks_on_the_grid_of_the_distillation(sd_folder: Path, sd: DiffusionBase) -> None:
    settings: dict[str, Any] = {"sampler": "lcm", "steps": 4, "original_steps": 40}
    pipe = pipeline(sd_folder, "lcm", fresh=True)
    pipe.scheduler.register_to_config(original_inference_steps=40)
    mine = ours(sd, settings)
    for picture, image in zip(mine, theirs(pipe, ImageParams(**settings)), strict=True):
        assert largest_difference(picture, image) <= 1
    default = ours(sd, settings | {"original_steps": 50})
    assert min(largest_difference(one, other) for one, other in zip(mine, default, strict=True)) > 1


def test_lcm_from_a_picture_takes_all_its_steps_within_the_strength(
    sd: DiffusionBase, sd_folder: Path
) -> None:
    settings = {"sampler": "lcm", "steps": 4, "strength": 0.5}
    params, start = ImageParams(**settings), photo(16, 16)  # type: ignore[arg-type]
    timesteps = list(timesteps_of(params, 1000))
    assert len(timesteps) == 4
    assert timesteps[0] == 499
    pipe = pipeline(sd_folder, "lcm", from_image=True)
    images = [start] * len(PROMPTS)
    wanted = pipe(
        PROMPTS,
        image=images,
        timesteps=timesteps,
        strength=1.0,  # the timesteps are those of the strength already
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
    ).images
    assert_same(ours(sd, settings, image=start), wanted)
