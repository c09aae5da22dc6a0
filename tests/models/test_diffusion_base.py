"""Our way through a model's networks against diffusers' pipelines, on tiny models of both layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils._paths import filter_repo_objects
from torch.testing import assert_close

from manylora.diffusion import ddim_step, last_latent, solve, trailing_timesteps
from manylora.errors import ConfigError, ModelError
from manylora.models.diffusion_base import Condition, DiffusionBase, load_diffusion_base
from manylora.models.tiny_diffusion import tiny_sd, tiny_sdxl

PROMPTS = ["a red circle", "a blue square and a very long text that no tokenizer of this size takes whole"]
PIPELINES: dict[str, Any] = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write = {"sd": tiny_sd, "sdxl": tiny_sdxl}[request.param]
    return write(tmp_path_factory.mktemp(request.param) / "base", prediction="v_prediction")


@pytest.fixture(scope="module")
def base(folder: Path) -> DiffusionBase:
    return load_diffusion_base(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path, base: DiffusionBase) -> Any:
    beside = {"safety_checker": None, "feature_extractor": None} if base.kind == "sd" else {}
    pipe = PIPELINES[base.kind].from_pretrained(folder, **beside)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_what_it_is(base: DiffusionBase) -> None:
    assert base.kind == ("sd" if len(base.text_encoders) == 1 else "sdxl")
    assert (base.default_size, base.latent_factor, base.latent_shape()) == (16, 2, (4, 8, 8))
    assert base.prediction == "v_prediction"
    assert not any(p.requires_grad for p in base.unet.parameters())
    with pytest.raises(ConfigError, match="height must be a multiple of"):
        base.latent_shape(17, 16)


def test_texts_are_encoded_as_in_the_pipeline(base: DiffusionBase, pipeline: Any) -> None:
    ours = base.encode_prompts(PROMPTS)
    assert not torch.allclose(ours.embeddings[0], ours.embeddings[1], atol=0.1), "texts differ"
    given = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    if base.kind == "sd":
        theirs, negative = pipeline.encode_prompt(PROMPTS, **given)
    else:
        theirs, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPTS, **given)
        assert ours.pooled is not None
        assert_close(ours.pooled, pooled)
        assert_close(base.unconditional().expand(2).pooled, negative_pooled)
        assert ours.time_ids is not None
        assert ours.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    assert_close(ours.embeddings, theirs)
    assert_close(base.unconditional().expand(2).embeddings, negative)


def test_guided_ddim_draws_what_the_pipeline_draws(base: DiffusionBase, pipeline: Any) -> None:
    noise = torch.randn(2, *base.latent_shape())
    theirs = pipeline(
        PROMPTS, latents=noise, num_inference_steps=5, guidance_scale=3.0, output_type="latent"
    )
    condition, unconditional = base.encode_prompts(PROMPTS), base.unconditional()
    denoise = base.guided_denoiser(condition, unconditional, 3.0)
    with torch.no_grad():
        ours = last_latent(solve(denoise, base.schedule, noise, trailing_timesteps(5), ddim_step))
        plain = last_latent(
            solve(base.denoiser(condition), base.schedule, noise, trailing_timesteps(5), ddim_step)
        )
    assert (ours - plain).abs().max() > 0.01, "guidance changes the result"
    assert_close(ours, theirs.images, atol=1e-4, rtol=1e-4)
    pixels = base.decode_latents(ours)
    shown = pipeline.image_processor.postprocess(
        pipeline.vae.decode(ours / 1.0)[0].detach(), output_type="pt"
    )
    assert_close((pixels / 2 + 0.5).clamp(0, 1), shown, atol=1e-5, rtol=1e-5)


def test_pictures_become_latents_and_the_same_again_by_seed(base: DiffusionBase) -> None:
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    mean = base.encode_images(pixels)
    drawn = [base.encode_images(pixels, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert mean.shape == (3, 4, 8, 8)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], mean)
    assert_close(mean, base.vae.encode(pixels).latent_dist.mean * base.vae.config.scaling_factor)


def test_rows_of_conditions(base: DiffusionBase) -> None:
    condition = base.encode_prompts(PROMPTS)
    swapped = condition.rows([1, 0])
    assert torch.equal(swapped.embeddings[0], condition.embeddings[1])
    both = Condition.cat([condition, swapped])
    assert len(both) == 4
    assert (both.pooled is None) == (base.kind == "sd")
    with pytest.raises(ConfigError, match="one row"):
        condition.expand(3)


def test_the_hash_is_of_the_weights(base: DiffusionBase, folder: Path) -> None:
    again = load_diffusion_base(folder)
    assert again.content_hash() == base.content_hash()
    with torch.no_grad():
        again.unet.conv_in.bias[0] += 1e-3
    assert again.content_hash() != base.content_hash()


def test_seeds_build_the_same_and_other_models(tmp_path: Path) -> None:
    hashes = [
        load_diffusion_base(tiny_sd(tmp_path / str(i), seed=seed)).content_hash()
        for i, seed in enumerate((1, 1, 2))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def edit(file: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def pickle_only(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "pytorch_model.bin")


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def truncated(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_index, "is no diffusers folder: expected model_index.json in it, found"),
        (edit("unet/config.json", in_channels=9), "inpainting"),
        (edit("unet/config.json", time_cond_proj_dim=32), "distilled already"),
        (edit("unet/config.json", num_class_embeds=7), "class labels"),
        (edit("unet/config.json", addition_embed_type="image"), "known: null"),
        (
            edit("scheduler/scheduler_config.json", prediction_type="flow"),
            "prediction_type 'flow'.*known: epsilon",
        ),
        (
            edit("scheduler/scheduler_config.json", beta_schedule="cosine"),
            "beta_schedule 'cosine'.*known: scaled",
        ),
        (edit("model_index.json", unet=[None, None]), r"missing: \['unet'\]"),
        (
            edit("model_index.json", transformer=["diffusers", "Flux"]),
            "expected Stable Diffusion's or SDXL's",
        ),
        (pickle_only, "no .safetensors in unet/.*Pickled"),
        (truncated, "unet cannot be loaded"),
    ],
)
def test_what_is_no_base_is_refused(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    load_diffusion_base(broken)
    change(broken)
    with pytest.raises(ModelError, match=message) as error:
        load_diffusion_base(broken)
    assert "broken" in str(error.value)


def test_half_precision_files_alone_are_read(base: DiffusionBase, folder: Path, tmp_path: Path) -> None:
    """As repositories hold them beside, or in place of, the full ones."""
    half = Path(shutil.copytree(folder, tmp_path / "half"))
    for path in half.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert load_diffusion_base(half).content_hash() == base.content_hash()


def test_a_hub_id_is_fetched_without_what_is_not_read(
    folder: Path, base: DiffusionBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def download(repo_id: str, **patterns: Any) -> str:
        if repo_id != "some/model":
            raise LocalEntryNotFoundError("no network")
        asked.append(patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load_diffusion_base("some/model")
    assert loaded.content_hash() == base.content_hash()
    assert (loaded.path, loaded.folder) == ("some/model", folder)
    (patterns,) = asked
    wanted = {"unet/diffusion_pytorch_model.safetensors", "model_index.json", "text_encoder/config.json"}
    refused = {
        "unet/diffusion_pytorch_model.bin",
        "model.ckpt",
        "unet/code.py",
        "safety_checker/model.safetensors",
    }
    fetched = set(filter_repo_objects(wanted | refused, **patterns))
    assert fetched == wanted
    with pytest.raises(ModelError, match=r"'other/model' is no folder here.*could not be fetched"):
        load_diffusion_base("other/model")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(folder: Path, device: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"device '{device}' cannot be used; here torch has \['cpu'.*\]: .+"
    ):
        load_diffusion_base(folder, device=device)


def test_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder, and no hub id"):
        load_diffusion_base(tmp_path / "nothing")
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(ModelError, match="is a file; expected a diffusers folder"):
        load_diffusion_base(tmp_path / "model.ckpt")
