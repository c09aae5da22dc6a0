"""From a diffusers folder or hub id to its networks, loaded and found to fit together.

Only safetensors are read. What a model's repository brings as code or pickles is never looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manylora.diffusion import NoiseSchedule, Prediction
from manylora.errors import ConfigError, ModelError
from manylora.models.progress_bars import no_progress_bars

_INDEX = "model_index.json"
_SCHEDULER = Path("scheduler") / "scheduler_config.json"

_NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
_HUB_PATTERNS = [
    _INDEX,
    str(_SCHEDULER),
    "tokenizer/*",
    "tokenizer_2/*",
    *(f"{network}/*.{kind}" for network in _NETWORKS for kind in ("json", "safetensors")),
]
# The same weights again: in half precision, without the average, for other libraries.
_HUB_IGNORED = ["*.fp16.*", "*non_ema*", "*openvino*", "*flax*", "*.onnx*"]


@dataclass(frozen=True, eq=False)
class DiffusionParts:
    """The networks of a pipeline, frozen and in evaluation mode, on their device."""

    folder: Path
    """Where its files lie on this machine."""
    unet: Any
    """diffusers' UNet2DConditionModel."""
    vae: Any
    """diffusers' AutoencoderKL."""
    text_encoders: tuple[Any, ...]
    """transformers' CLIP text encoders: one for SD, two for SDXL."""
    tokenizers: tuple[Any, ...]
    schedule: NoiseSchedule
    prediction: Prediction
    empty_is_zero: bool
    """Whether no prompt at all is a row of zeros (SDXL's `force_zeros_for_empty_prompt`), not the empty text."""


def load_parts(source: str | Path, *, dtype: torch.dtype, device: torch.device) -> DiffusionParts:
    """Load every part; arguments and errors as `diffusion_base.load_diffusion_base`."""
    folder, index = _locate(source)
    _refuse_other_layouts(index, source)
    schedule, prediction = _noise(folder, source)
    # Before the weights are read: a model of another kind is refused in no time.
    unet_config = _read_json(folder / "unet" / "config.json", source)
    _refuse_other_unets(unet_config, source)

    import diffusers
    import transformers

    def load(cls: Any, part: str, dtype: torch.dtype = dtype) -> Any:
        return _freeze(_load_network(cls, folder, part, dtype, source), device)

    two = _is_sdxl(index)
    with no_progress_bars():
        encoders = [load(transformers.CLIPTextModel, "text_encoder")]
        if two:
            encoders.append(load(transformers.CLIPTextModelWithProjection, "text_encoder_2"))
    vae_config = _read_json(folder / "vae" / "config.json", source)
    parts = DiffusionParts(
        folder=folder,
        unet=load(diffusers.UNet2DConditionModel, "unet"),
        vae=load(
            diffusers.AutoencoderKL, "vae", torch.float32 if vae_config.get("force_upcast", True) else dtype
        ),
        text_encoders=tuple(encoders),
        tokenizers=tuple(
            _load_tokenizer(folder / part, source)
            for part in (("tokenizer", "tokenizer_2") if two else ("tokenizer",))
        ),
        schedule=schedule,
        prediction=prediction,
        empty_is_zero=two and bool(index.get("force_zeros_for_empty_prompt", True)),
    )
    _refuse_misfit(parts, source)
    return parts


def _locate(source: str | Path) -> tuple[Path, Mapping[str, Any]]:
    folder = Path(source).expanduser()
    if folder.is_file():
        raise ModelError(
            f"'{source}' is a file; expected a diffusers folder with {_INDEX}. A single checkpoint file can be turned "
            "into one with diffusers' from_single_file(..).save_pretrained(..)"
        )
    if not folder.is_dir():
        if not (isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source)):
            raise ModelError(f"no diffusion model '{source}': no such folder, and no hub id (org/name)")
        folder = _from_hub(source)
    if not (folder / _INDEX).is_file():
        held = sorted(path.name for path in folder.iterdir())[:8]
        raise ModelError(f"'{source}' is no diffusers folder: expected {_INDEX} in it, found {held}")
    return folder, _read_json(folder / _INDEX, source)


def _from_hub(repo_id: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"diffusion model '{repo_id}' is no folder here, not in the hub's cache, and could not be fetched: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def _is_sdxl(index: Mapping[str, Any]) -> bool:
    return _has(index, "text_encoder") and _has(index, "text_encoder_2")


def _has(index: Mapping[str, Any], part: str) -> bool:
    """Whether the pipeline has the part: its entry is [library, class], or [null, null] where it was left out."""
    entry = index.get(part)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _refuse_other_layouts(index: Mapping[str, Any], source: object) -> None:
    missing = [part for part in ("unet", "vae", "text_encoder", "tokenizer") if not _has(index, part)]
    if missing or _has(index, "text_encoder_3") or _has(index, "transformer"):
        parts = sorted(part for part in index if _has(index, part))
        raise ModelError(
            f"'{source}' is a {index.get('_class_name', 'pipeline of no class')} of {parts}; expected Stable "
            f"Diffusion's or SDXL's layout (unet, vae, text_encoder, tokenizer; SDXL: text_encoder_2, tokenizer_2)"
            + (f"; missing: {missing}" if missing else "")
        )


def _refuse_other_unets(config: Mapping[str, Any], source: object) -> None:
    channels = config.get("in_channels", 4)
    if channels == 9:
        raise ModelError(
            f"'{source}': its UNet takes 9 channels, so it is an inpainting model; expected one for text to image"
        )
    extras = {
        "encoder_hid_dim": "embeddings of another kind (image prompts, or a text encoder of another width)",
        "class_embed_type": "class labels",
        "num_class_embeds": "class labels",
        "time_cond_proj_dim": "a guidance embedding: it is itself distilled already (an LCM)",
    }
    for key, meaning in extras.items():
        if config.get(key) is not None:
            raise ModelError(
                f"'{source}': unet/config.json has {key} = {config[key]!r}, so the UNet also takes {meaning}, which "
                "is not supported; expected a plain text-to-image UNet"
            )
    if (added := config.get("addition_embed_type")) not in (None, "text_time"):
        raise ModelError(
            f"'{source}': unet/config.json has addition_embed_type {added!r}; known: null (SD), 'text_time' (SDXL)"
        )


def _refuse_misfit(parts: DiffusionParts, source: object) -> None:
    """Refuse parts of different models, which loading alone does not notice."""
    unet, vae = parts.unet.config, parts.vae.config
    if unet.in_channels != vae.latent_channels:
        raise ModelError(
            f"'{source}': the UNet takes {unet.in_channels} channels, the VAE's latents have {vae.latent_channels}"
        )
    width = sum(encoder.config.hidden_size for encoder in parts.text_encoders)
    if unet.cross_attention_dim != width:
        raise ModelError(
            f"'{source}': the UNet attends to text of width {unet.cross_attention_dim}, the text encoders give {width}"
        )
    if (unet.addition_embed_type == "text_time") != (len(parts.text_encoders) == 2):
        raise ModelError(
            f"'{source}': a UNet with addition_embed_type {unet.addition_embed_type!r} beside "
            f"{len(parts.text_encoders)} text encoder(s); SD has null and one, SDXL 'text_time' and two"
        )


def _noise(folder: Path, source: object) -> tuple[NoiseSchedule, Prediction]:
    config = _read_json(folder / _SCHEDULER, source)
    try:
        return NoiseSchedule.from_diffusers(config), Prediction.from_diffusers(config)
    except ConfigError as error:
        raise ModelError(f"'{source}', {_SCHEDULER}: {error}") from error


def _load_network(cls: Any, folder: Path, part: str, dtype: torch.dtype, source: object) -> Any:
    files = sorted(path.name for path in (folder / part).glob("*.safetensors"))
    if not files:
        held = sorted(path.name for path in (folder / part).glob("*")) or "no such folder"
        raise ModelError(
            f"'{source}': no .safetensors in {part}/ ({held}). Pickled weights (.bin, .ckpt) can run code and are "
            "not read: save the pipeline again with safe_serialization=True"
        )
    half_only = all(".fp16." in name for name in files)
    options: dict[str, Any] = {"variant": "fp16"} if half_only else {}
    # diffusers and transformers have each their name for it.
    options["torch_dtype" if cls.__module__.startswith("diffusers") else "dtype"] = dtype
    return _or_model_error(
        lambda: cls.from_pretrained(folder / part, use_safetensors=True, local_files_only=True, **options),
        f"'{source}': {part}",
    )


def _load_tokenizer(folder: Path, source: object) -> Any:
    from transformers import CLIPTokenizer

    return _or_model_error(
        lambda: CLIPTokenizer.from_pretrained(folder, local_files_only=True), f"'{source}': {folder.name}"
    )


def _or_model_error(load: Callable[[], Any], what: str) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{what} cannot be loaded: {reason}") from error


def _freeze(network: Any, device: torch.device) -> Any:
    return network.to(device).eval().requires_grad_(False)


def _read_json(path: Path, source: object) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"'{source}': {path.parent.name}/{path.name} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"'{source}': {path.name} must be a JSON object, got {type(values).__name__}")
    return values
