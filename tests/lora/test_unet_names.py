"""Every site of the full-size models has one name in each format, and no two share one."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.errors import AdapterFormatError
from manylora.lora.diffusers_keys import diffusers_name, parse_diffusers
from manylora.lora.kohya_keys import Layout, kohya_name, layout_of, parse_kohya
from manylora.lora.unet_names import TEXT_WORDS, UNET_WORDS, from_stability, to_stability
from tests.lora.unets import SD15, SDXL, TINY_SD, TINY_SDXL, sites, unet

NUM_SITES = {"sd": (SD15, 282), "sdxl": (SDXL, 794)}


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_kohyas_names_of_a_full_size_unet_are_one_to_one(layout: Layout) -> None:
    config, num_sites = NUM_SITES[layout]
    found = list(sites(unet(config, device="meta")))
    assert len(found) == num_sites
    names = {kohya_name(site, layout): site for site in found}
    assert len(names) == num_sites, "two sites share a name"
    assert {name: parse_kohya(f"{name}.lora_down.weight") for name in names} == {
        name: (site, "lora_a") for name, site in names.items()
    }
    assert layout_of(found) == layout


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd", "sdxl"])
def test_diffusers_names_of_a_full_size_unet_are_one_to_one(config: dict[str, Any]) -> None:
    found = list(sites(unet(config, device="meta")))
    names = {diffusers_name(site): site for site in found}
    assert len(names) == len(found)
    assert all(parse_diffusers(f"{name}.lora_B.weight") == (site, "lora_b") for name, site in names.items())


def test_sdxls_names_in_stabilitys_layout() -> None:
    # Spot checks against names that sd-scripts writes for SDXL.
    known = {
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "input_blocks_4_1_transformer_blocks_1_attn2_to_k": (
            "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"
        ),
        "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
        "middle_block_1_transformer_blocks_9_ff_net_0_proj": (
            "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"
        ),
        "middle_block_2_emb_layers_1": "mid_block.resnets.1.time_emb_proj",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_5_0_out_layers_3": "up_blocks.1.resnets.2.conv2",
        "output_blocks_5_1_transformer_blocks_0_attn1_to_out_0": (
            "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0"
        ),
        "label_emb_0_2": "add_embedding.linear_2",
    }
    for flat, site in known.items():
        assert from_stability(flat) == site
        assert to_stability(site) == flat
    # SD 1.5's first upsampler, in a stage without attention, would stand one place earlier.
    assert from_stability("output_blocks_2_1_conv") == "up_blocks.0.upsamplers.0.conv"


@pytest.mark.parametrize(
    "flat",
    [
        "input_blocks_0_0_in_layers_2",
        "input_blocks_3_1_proj_in",
        "input_blocks_3_0_in_layers_2",
        "input_blocks_1_0_conv",
        "input_blocks_4_1_frobnicate",
        "output_blocks_1_1_conv",
        "output_blocks_2_0_conv",
        "middle_block_3_in_layers_2",
        "middle_block_0_proj_in",
        "down_blocks_0_resnets_0_conv1",
    ],
)
def test_what_is_no_name_of_stabilitys_is_none(flat: str) -> None:
    assert from_stability(flat) is None


@pytest.mark.parametrize("words", [UNET_WORDS, TEXT_WORDS])
def test_no_word_is_others_joined(words: frozenset[str]) -> None:
    """So that a flattened name has one reading."""
    for word in words:
        parts = word.split("_")
        for cut in range(1, len(parts)):
            head, tail = "_".join(parts[:cut]), "_".join(parts[cut:])
            assert not ((head in words or head.isdecimal()) and (tail in words or tail.isdecimal())), word


@pytest.mark.parametrize(("config", "layout"), [(TINY_SD, "sd"), (TINY_SDXL, "sdxl")])
def test_the_tiny_models_have_the_same_names(config: dict[str, Any], layout: Layout) -> None:
    tiny = set(sites(unet(config, device="meta")))
    assert tiny <= set(sites(unet(NUM_SITES[layout][0], device="meta")))
    assert layout_of(tiny) == layout


def test_text_encoders_have_one_name_each() -> None:
    inside = "text_model.encoder.layers.11.self_attn.out_proj"
    flat = "text_model_encoder_layers_11_self_attn_out_proj"
    assert kohya_name(f"text_encoder.{inside}", "sd") == f"lora_te_{flat}"
    assert kohya_name(f"text_encoder.{inside}", "sdxl") == f"lora_te1_{flat}"
    assert kohya_name(f"text_encoder_2.{inside}", "sdxl") == f"lora_te2_{flat}"
    assert kohya_name("text_encoder_2.text_projection", "sdxl") == "lora_te2_text_projection"
    for prefix, component in (("te", ""), ("te1", ""), ("te2", "_2")):
        # transformers 5 leaves text_model out, and so does what diffusers writes on it
        for name in (flat, flat.removeprefix("text_model_")):
            assert parse_kohya(f"lora_{prefix}_{name}.alpha") == (
                f"text_encoder{component}.{inside}",
                "alpha",
            )


@given(st.lists(st.sampled_from([*sorted(UNET_WORDS), "0", "1", "12", "x", "", "9" * 5000]), max_size=8))
def test_no_name_breaks_the_parsers(words: list[str]) -> None:
    site, flat = ".".join(words), "_".join(words)
    for name in (f"lora_unet_{flat}.alpha", f"lora_te_{flat}.alpha", f"lora_unet_{flat}", flat):
        parse_kohya(name)
    parse_diffusers(f"unet.{site}.lora.down.weight")
    stability = to_stability(site)
    assert stability is None or from_stability(stability) == site
    for layout in get_args(Layout):
        try:
            name = kohya_name(site, layout)
        except AdapterFormatError:
            continue
        assert parse_kohya(f"{name}.alpha") == (site, "alpha")
