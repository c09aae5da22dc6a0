"""What we write diffusers loads, what diffusers and PEFT write we load, and the UNet's output is the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from manylora import Library, attach
from manylora.lora.adapter import Adapter
from manylora.lora.components import components
from manylora.lora.convert import Format, load_adapter, save_adapter
from manylora.lora.fit import move_sites
from manylora.lora.kohya_keys import Layout
from tests.lora.unets import LCM_TARGETS, SD15, TINY_SD, TINY_SDXL, sites, unet

BOUND = 1e-5
"""Largest difference between two ways to the same output, relative to the largest output, in float32."""

CONFIGS: dict[Layout, dict[str, Any]] = {"sd": TINY_SD, "sdxl": TINY_SDXL}
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}

RANKS = {"conv1": 2, "to_k": 3, "ff.net.2": 5}
"""Where the rank is not 4."""


def inputs(layout: Layout, num_rows: int = 2) -> dict[str, Any]:
    config = CONFIGS[layout]
    size, width = config["sample_size"], config["cross_attention_dim"]
    given: dict[str, Any] = {
        "sample": torch.randn(num_rows, 4, size, size),
        "timestep": torch.arange(num_rows) * 300 + 19,
        "encoder_hidden_states": torch.randn(num_rows, 5, width),
    }
    if layout == "sdxl":
        added = {"text_embeds": torch.randn(num_rows, 8), "time_ids": torch.rand(num_rows, 6) * 64}
        given["added_cond_kwargs"] = added
    return given


def output(model: UNet2DConditionModel, given: Mapping[str, Any]) -> Tensor:
    with torch.inference_mode():
        sample: Tensor = model(**given).sample
    return sample


def difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def with_lora(
    layout: Layout, alpha: float, alphas: Mapping[str, float] | None = None
) -> UNet2DConditionModel:
    """A UNet with a PEFT adapter on all the sites of an LCM-LoRA, its lora_B no longer zero."""
    model = unet(CONFIGS[layout])
    model.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=alpha,
            target_modules=LCM_TARGETS,
            rank_pattern=RANKS,
            alpha_pattern=dict(alphas or {}),
        )
    )
    for module in model.modules():
        if isinstance(module, LoraLayer):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.05)
    return model.eval()


def attached_output(
    base: UNet2DConditionModel, adapter: Adapter, given: Mapping[str, Any], memory_bytes: int = 64 << 20
) -> Tensor:
    library = Library()
    library.add("it", adapter)
    with attach(base, library, memory_bytes=memory_bytes) as lora, lora.rows(["it"] * len(given["sample"])):
        return output(base, given)


def bare(model: UNet2DConditionModel, layout: Layout) -> UNet2DConditionModel:
    """The base of a UNet with an adapter."""
    base = unet(CONFIGS[layout]).eval()
    weights = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if ".lora_" not in k}
    base.load_state_dict(weights)
    return base


def save_as_peft(model: UNet2DConditionModel, folder: Path) -> Path:
    """Write what `PeftModel.save_pretrained` would, for an adapter that sits in a bare UNet."""
    folder.mkdir()
    model.peft_config["default"].save_pretrained(str(folder))
    state = get_peft_model_state_dict(model)
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def pipeline(layout: Layout, base: UNet2DConditionModel, text_encoder: CLIPTextModel | None = None) -> Any:
    """A pipeline of nothing but what takes LoRAs."""
    nothing = dict.fromkeys(("vae", "tokenizer", "scheduler"))
    beside: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    if layout == "sdxl":
        beside = {"text_encoder_2": None, "tokenizer_2": None}
    return PIPELINES[layout](unet=base, text_encoder=text_encoder, **nothing, **beside)


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
@pytest.mark.parametrize("style", ["new", "mixed", "saved by the pipeline", "kohya", "peft"])
def test_what_diffusers_and_peft_write_gives_the_same_output(
    tmp_path: Path, layout: Layout, style: str
) -> None:
    alphas = {"conv2": 3.0, "to_q": 1.0} if style in ("saved by the pipeline", "peft") else None
    model = with_lora(layout, alpha=4, alphas=(alphas or {}) | RANKS)
    given = inputs(layout)
    want, base = output(model, given), bare(model, layout)
    assert difference(output(base, given), want) > 0.01, "the adapter changes the output"
    state = get_peft_model_state_dict(model)
    unet_state = {f"unet.{name}": tensor.contiguous() for name, tensor in state.items()}
    path = tmp_path / "it.safetensors"
    if style == "new":
        save_file(unet_state, path)
    elif style == "mixed":
        old = convert_state_dict_to_diffusers(unet_state)
        assert any(".lora.down" in name for name in old)
        save_file(old, path)
    elif style == "kohya":
        save_file(convert_state_dict_to_kohya(unet_state), path)
    elif style == "peft":
        path = save_as_peft(model, tmp_path / "it")
    else:
        path = tmp_path / "it"
        PIPELINES[layout].save_lora_weights(
            str(path),
            unet_lora_layers=state,
            unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )
    adapter = load_adapter(path)
    assert len(adapter.sites) == len(state) // 2
    assert difference(attached_output(base, adapter, given), want) < BOUND


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_diffusers_loads_what_we_write(tmp_path: Path, layout: Layout, to: str) -> None:
    # diffusers finds the alphas of kohya's attention projections only where all alphas of the file are equal.
    alphas = {"conv2": 3.0, "to_q": 1.0} if to == "diffusers" else None
    model = with_lora(layout, alpha=6.0, alphas=alphas)
    given = inputs(layout)
    want, base = output(model, given), bare(model, layout)
    assert difference(output(base, given), want) > 0.01, "the adapter changes the output"
    save_as_peft(model, tmp_path / "peft")
    adapter = load_adapter(tmp_path / "peft")
    assert {pair.scaling for pair in adapter.sites.values()} != {1.0}
    save_adapter(adapter, tmp_path / "it.safetensors", to)  # type: ignore[arg-type]
    pipe = pipeline(layout, base)
    pipe.load_lora_weights(str(tmp_path), weight_name="it.safetensors")
    loaded = {name.removesuffix(".base_layer") for name in sites(base) if name.endswith(".base_layer")}
    assert loaded == set(adapter.sites), "every site got its LoRA"
    assert difference(output(base, given), want) < BOUND


def test_a_text_encoder_beside_the_unet(tmp_path: Path) -> None:
    config = CLIPTextConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=9,
    )
    encoder, tokens = CLIPTextModel(config).eval(), torch.randint(0, 30, (2, 7))

    def encoded() -> Tensor:
        with torch.inference_mode():
            hidden: Tensor = encoder(tokens).last_hidden_state
        return hidden

    before, weights = encoded(), {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    # Not by its own add_adapter, which wants a newer PEFT with each release of transformers.
    lora_config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "out_proj", "fc1"])
    inject_adapter_in_model(lora_config, encoder)
    encoder.peft_config = {"default": lora_config}
    for module in encoder.modules():
        if isinstance(module, LoraLayer):
            torch.nn.init.normal_(module.lora_B["default"].weight)
    want = encoded()
    assert difference(before, want) > 0.01
    model = with_lora("sd", alpha=6.0)
    StableDiffusionPipeline.save_lora_weights(
        str(tmp_path / "theirs"),
        unet_lora_layers=get_peft_model_state_dict(model),
        text_encoder_lora_layers=get_peft_model_state_dict(encoder),
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=encoder.peft_config["default"].to_dict(),
    )
    adapter = load_adapter(tmp_path / "theirs")
    assert {site for site in adapter.sites if site.startswith("text_encoder.")} == {
        f"text_encoder.text_model.encoder.layers.{layer}.{name}"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
    }
    fresh = CLIPTextModel(config).eval()
    fresh.load_state_dict(weights)
    library = Library()
    library.add("it", move_sites(components(adapter)["text_encoder"], "text_model.", ""))
    with attach(fresh, library) as lora, lora.rows(["it", "it"]), torch.inference_mode():
        assert difference(fresh(tokens).last_hidden_state, want) < BOUND

    for to in get_args(Format)[1:]:
        save_adapter(adapter, tmp_path / f"{to}.safetensors", to)
        fresh = CLIPTextModel(config).eval()
        fresh.load_state_dict(weights)
        pipe = pipeline("sd", bare(model, "sd"), fresh)
        pipe.load_lora_weights(str(tmp_path), weight_name=f"{to}.safetensors")
        with torch.inference_mode():
            assert difference(fresh(tokens).last_hidden_state, want) < BOUND
        given = inputs("sd")
        assert difference(output(pipe.unet, given), output(model, given)) < BOUND


def num_lora_parameters(config: dict[str, Any], rank: int, targets: list[str]) -> int:
    """Count by the sizes of the modules, not by an adapter."""
    adapted = [
        module
        for site, module in sites(unet(config, device="meta")).items()
        if any(site == target or site.endswith(f".{target}") for target in targets)
    ]
    return sum(rank * (module.weight[0].numel() + module.weight.shape[0]) for module in adapted)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_full_size_lcm_lora_of_sd15(tmp_path: Path) -> None:
    # The LCM-LoRA report counts 67.5M: that is with the first and the last conv, which its scripts leave out.
    all_convs = [*LCM_TARGETS, "conv_in", "conv_out"]
    assert num_lora_parameters(SD15, 64, LCM_TARGETS) == 67_252_224
    assert num_lora_parameters(SD15, 64, all_convs) == 67_459_584
    model = unet(SD15).eval()
    model.add_adapter(LoraConfig(r=64, lora_alpha=32, target_modules=all_convs))
    state = get_peft_model_state_dict(model)
    for name, tensor in state.items():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.01)
    assert sum(tensor.numel() for tensor in state.values()) == 67_459_584
    given = {
        "sample": torch.randn(1, 4, 16, 16),
        "timestep": torch.tensor([519]),
        "encoder_hidden_states": torch.randn(1, 77, 768),
    }
    want = output(model, given)
    save_as_peft(model, tmp_path / "peft")
    adapter = load_adapter(tmp_path / "peft")
    save_adapter(adapter, tmp_path / "lcm.safetensors", "kohya")
    assert load_adapter(tmp_path / "lcm.safetensors").identity == adapter.identity
    model.delete_adapters("default")
    model.unload_lora()
    assert difference(output(model, given), want) > 0.01
    attached = attached_output(
        model, load_adapter(tmp_path / "lcm.safetensors"), given, memory_bytes=1 << 30
    )
    assert difference(attached, want) < BOUND
    pipe = pipeline("sd", model)
    pipe.load_lora_weights(str(tmp_path), weight_name="lcm.safetensors")
    assert difference(output(model, given), want) < BOUND
