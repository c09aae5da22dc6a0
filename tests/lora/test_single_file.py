"""One .safetensors file of kohya's or diffusers': read to the bit, or refused by name."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from manylora.errors import AdapterFormatError, AdapterNotFoundError, AdapterUnavailableError, ConfigError
from manylora.lora.adapter import Adapter, LoraPair
from manylora.lora.components import components
from manylora.lora.convert import DIFFUSERS_FILE, Format, load_adapter, peek_adapter, save_adapter
from manylora.lora.diffusers_metadata import KEY
from manylora.lora.kohya_keys import Layout

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "up_blocks.0.resnets.2.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
KOHYA_Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


def pair(
    rank: int, scaling: float, *, kernel: tuple[int, int] | None = None, dtype: torch.dtype = torch.float32
) -> LoraPair:
    in_features = 4 * (kernel[0] * kernel[1] if kernel else 1)
    return LoraPair(
        torch.randn(rank, in_features).to(dtype), torch.randn(6, rank).to(dtype), scaling, kernel
    )


def some_adapter(layout: Layout, dtype: torch.dtype = torch.float32) -> Adapter:
    """Linear, 1x1 and 3x3 conv, ranks and scalings that differ, one of them no float32 alpha; both kinds of model."""
    sites = {
        Q: pair(3, 0.3 / 3, dtype=dtype),
        CONV: pair(2, 0.5, kernel=(3, 3), dtype=dtype),
        "mid_block.attentions.0.proj_in": pair(4, -2.0, kernel=(1, 1), dtype=dtype),
        "down_blocks.0.resnets.0.time_emb_proj": pair(8, 1.0, dtype=dtype),
        TEXT: pair(2, 1.5, dtype=dtype),
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj": pair(5, 0.2, dtype=dtype),
    }
    if layout == "sdxl":
        sites["text_encoder_2.text_model.encoder.layers.3.mlp.fc2"] = pair(1, 1.0, dtype=dtype)
    return Adapter(sites, name="some", base_model="some/base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_every_way_from_format_to_format_is_exact(
    tmp_path: Path, layout: Layout, dtype: torch.dtype
) -> None:
    adapter = some_adapter(layout, dtype)
    formats: tuple[Format, ...] = ("peft", "diffusers", "kohya")
    for first in formats:
        for second in formats:
            one, two = (
                tmp_path / f"{first}-{second}-{step}{'' if to == 'peft' else '.safetensors'}"
                for step, to in ((1, first), (2, second))
            )
            save_adapter(adapter, one, first, layout=layout)
            save_adapter(load_adapter(one), two, second, layout=layout)
            again = load_adapter(two)
            assert again.identity == adapter.identity, (first, second)
            assert (again.base_model, again.dtype) == ("some/base", dtype)
            header = peek_adapter(two)
            assert header.num_bytes == adapter.num_bytes
            assert {site: (of.rank, of.scaling, of.kernel_size) for site, of in header.sites.items()} == {
                site: (of.rank, of.scaling, of.kernel_size) for site, of in adapter.sites.items()
            }


def test_the_files_are_what_their_formats_say(tmp_path: Path) -> None:
    adapter = some_adapter("sd")
    save_adapter(adapter, tmp_path / "k.safetensors", "kohya", layout="sd")
    with safe_open(tmp_path / "k.safetensors", "pt") as file:
        assert len(list(file.keys())) == 3 * len(adapter.sites)
        alpha = file.get_tensor(f"{KOHYA_Q}.alpha")
        assert (alpha.item() / 3, alpha.shape, alpha.dtype) == (0.3 / 3, (), torch.float64)
        conv = "lora_unet_up_blocks_0_resnets_2_conv1"
        assert file.get_tensor(f"{conv}.alpha").dtype == torch.float32
        assert file.get_slice(f"{conv}.lora_down.weight").get_shape() == [2, 4, 3, 3]
        assert file.get_slice(f"{conv}.lora_up.weight").get_shape() == [6, 2, 1, 1]
    save_adapter(adapter, tmp_path / "d", "diffusers")
    with safe_open(tmp_path / "d" / DIFFUSERS_FILE, "pt") as file:
        assert f"unet.{Q}.lora_A.weight" in file.keys()  # no mapping
        assert f"{TEXT}.lora_B.weight" in file.keys()


def test_peeking_reads_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "k.safetensors"
    save_adapter(some_adapter("sd"), path, "kohya", layout="sd")
    sound = peek_adapter(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    nan = float("nan")
    save_file({name: t if name.endswith(".alpha") else t * nan for name, t in tensors.items()}, path)
    assert peek_adapter(path).sites == sound.sites
    with pytest.raises(AdapterFormatError, match="NaN or Inf"):
        load_adapter(path)


OLD_STYLES = {
    "attention processors": ("{}.processor.to_q_lora.down.weight", "{}.processor.to_q_lora.up.weight"),
    "unet, attention processors": (
        "unet.{}.processor.to_q_lora.down.weight",
        "unet.{}.processor.to_q_lora.up.weight",
    ),
    "lora layers": ("unet.{}.to_q.lora.down.weight", "unet.{}.to_q.lora.up.weight"),
    "peft": ("unet.{}.to_q.lora_A.weight", "unet.{}.to_q.lora_B.weight"),
    "no prefix": ("{}.to_q.lora_A.weight", "{}.to_q.lora_B.weight"),
}


@pytest.mark.parametrize("style", OLD_STYLES)
def test_every_style_of_diffusers_names_is_read(tmp_path: Path, style: str) -> None:
    down, up = (name.format(Q.removesuffix(".to_q")) for name in OLD_STYLES[style])
    a, b = torch.randn(2, 4), torch.randn(6, 2)
    save_file({down: a, up: b}, tmp_path / DIFFUSERS_FILE)
    for path in (tmp_path, tmp_path / DIFFUSERS_FILE):
        adapter = load_adapter(path)
        assert adapter.name == tmp_path.name
        assert list(adapter.sites) == [Q]
        assert torch.equal(adapter.sites[Q].delta(), b.double() @ a.double()), "no alpha: scaling 1"
    save_file({down: a, up: b, f"unet.{Q}.alpha": torch.tensor(3.0)}, tmp_path / "x.safetensors")
    assert load_adapter(tmp_path / "x.safetensors").sites[Q].scaling == 1.5


def test_text_encoders_of_old_diffusers_files_are_read(tmp_path: Path) -> None:
    layer = "text_encoder.text_model.encoder.layers.0.self_attn"
    halves = {
        "to_q_lora.{}": "q_proj",
        "to_out_lora.{}": "out_proj",
        "k_proj.lora_linear_layer.{}": "k_proj",
    }
    tensors = {
        f"{layer}.{name.format(half)}.weight": torch.randn(shape)
        for name in halves
        for half, shape in (("down", (2, 4)), ("up", (4, 2)))
    }
    save_file(tensors, tmp_path / "t.safetensors")
    assert set(load_adapter(tmp_path / "t.safetensors").sites) == {
        f"{layer}.{name}" for name in halves.values()
    }


def test_to_out_is_its_linear(tmp_path: Path) -> None:
    attention = Q.removesuffix(".to_q")
    save_file(
        {
            f"{attention}.processor.to_out_lora.down.weight": torch.randn(2, 4),
            f"{attention}.processor.to_out_lora.up.weight": torch.randn(4, 2),
        },
        tmp_path / "o.safetensors",
    )
    assert list(load_adapter(tmp_path / "o.safetensors").sites) == [f"{attention}.to_out.0"]


@pytest.mark.parametrize(
    ("alpha", "scaling"),
    [
        (None, 1.0),
        (torch.tensor(1.0), 0.5),
        (torch.tensor(1.0).bfloat16(), 0.5),
        (torch.tensor([1.0]), 0.5),
        (torch.tensor(1), 0.5),
        (torch.tensor(-3.0).half(), -1.5),
    ],
)
def test_alphas_of_every_dtype_are_read(tmp_path: Path, alpha: Tensor | None, scaling: float) -> None:
    path = write_kohya(tmp_path, {} if alpha is None else {f"{KOHYA_Q}.alpha": alpha})
    adapter = load_adapter(path)
    assert adapter.sites[Q].scaling == peek_adapter(path).sites[Q].scaling == scaling
    assert adapter.dtype == torch.float16, "an alpha's dtype is not the adapter's"


def write_kohya(folder: Path, more: dict[str, Tensor], drop: str = "") -> Path:
    tensors = {
        f"{KOHYA_Q}.lora_down.weight": torch.randn(2, 4).half(),
        f"{KOHYA_Q}.lora_up.weight": torch.randn(6, 2).half(),
    }
    tensors = {name: tensor for name, tensor in tensors.items() if not drop or drop not in name}
    save_file(tensors | more, folder / "k.safetensors")
    return folder / "k.safetensors"


def refusal(path: Path) -> str:
    """The message; the header alone must be enough to refuse."""
    with pytest.raises(AdapterFormatError) as refused:
        peek_adapter(path)
    with pytest.raises(AdapterFormatError):
        load_adapter(path)
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"{KOHYA_Q}.dora_scale", "DoRA"),
        (f"{KOHYA_Q}.hada_w1_a", "LoHa"),
        (f"{KOHYA_Q}.lokr_w1", "LoKr"),
        (f"{KOHYA_Q}.lora_mid.weight", "Tucker"),
        (f"{KOHYA_Q}.on_input", r"(IA)^3"),
        (f"{KOHYA_Q}.diff", "whole weight"),
        (f"{KOHYA_Q}.diff_b", "whole weight"),
        (f"{KOHYA_Q}.oft_blocks", "OFT"),
        (f"{KOHYA_Q}.a1.weight", "GLoRA"),
        (f"{KOHYA_Q}.w_norm", "norm layer"),
        (f"{KOHYA_Q}.scalar", "scalar"),
        (f"{KOHYA_Q}.lora_up.bias", "bias"),
        (f"unet.{Q}.lora_magnitude_vector", "DoRA"),
        (f"unet.{Q}.lora_A.bias", "bias"),
        ("bundle_emb.word.string_to_param.*", "textual inversion"),
        ("lora_te3_encoder_block_0.lora_down.weight", "no UNet"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "no UNet"),
        (f"{KOHYA_Q}.weight", "no name of kohya's"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "no name of kohya's"),
        (f"unet.{Q}.lora_A.weight", "no name of kohya's"),
        ("something", "no name of kohya's"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    load_adapter(write_kohya(tmp_path, {}))
    message = refusal(write_kohya(tmp_path, {name: torch.ones(2, 4)}))
    assert name in message
    assert kind in message


@pytest.mark.parametrize(
    ("more", "drop", "says"),
    [
        ({}, "lora_up", "has lora_a"),
        ({}, "lora_down", "has lora_b"),
        ({f"{KOHYA_Q.replace('to_q', 'to_k')}.alpha": torch.tensor(1.0)}, "", "has alpha"),
        ({f"{KOHYA_Q}.alpha": torch.tensor(0.0)}, "", "not 0"),
        ({f"{KOHYA_Q}.alpha": torch.tensor(float("nan"))}, "", "finite"),
        ({f"{KOHYA_Q}.alpha": torch.ones(2)}, "", "one number"),
        ({f"{KOHYA_Q}.alpha": torch.tensor(True)}, "", "one number"),
        (
            {f"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_{h}.weight": torch.ones(2, 2)
             for h in ("up", "down")},
            "",
            "are both",
        ),
        ({f"{KOHYA_Q}.lora_up.weight": torch.ones(6, 3)}, "lora_up", "rank 2"),
        ({f"{KOHYA_Q}.lora_up.weight": torch.ones(6, 2, 1, 1)}, "lora_up", "expected [rank, in]"),
        ({f"{KOHYA_Q}.lora_up.weight": torch.ones(6, 2, dtype=torch.int8)}, "lora_up", "is I8"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_refused(
    tmp_path: Path, more: dict[str, Tensor], drop: str, says: str
) -> None:
    assert says in refusal(write_kohya(tmp_path, more, drop))


def test_files_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"model.layers.0.weight": torch.ones(2)}, path)
    assert "none has the name of a LoRA's" in refusal(path)
    save_file({}, path)
    assert "holds 0 tensors" in refusal(path)
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 2)}, path)
    assert "adapter_config.json" in refusal(path)
    path.write_bytes(b"nothing")
    assert "safetensors" in refusal(path)
    (tmp_path / "x.pt").write_bytes(b"")
    assert "pickles" in refusal(tmp_path / "x.pt")
    with pytest.raises(AdapterNotFoundError):
        load_adapter(tmp_path / "y.safetensors")


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_a_file_that_cannot_be_read_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool, error: int
) -> None:
    path = tmp_path / ("lcm" if folder else "lcm.safetensors")
    save_adapter(some_adapter("sd"), path, "diffusers")
    assert load_adapter(path).sites

    def refuse(file: Path, *args: object, **kwargs: object) -> None:
        raise OSError(error, os.strerror(error), os.fspath(file))

    monkeypatch.setattr(Path, "open", refuse)
    named = path / DIFFUSERS_FILE if folder else path
    for read in (load_adapter, peek_adapter):
        with pytest.raises(AdapterUnavailableError) as raised:
            read(path)
        assert str(raised.value) == f"'{named}' cannot be read: {os.strerror(error)}"


def diffusers_file(
    folder: Path, metadata: dict[str, Any] | str, more: dict[str, Tensor] | None = None
) -> Path:
    tensors = {f"unet.{Q}.lora_A.weight": torch.ones(2, 4), f"unet.{Q}.lora_B.weight": torch.ones(6, 2)}
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(tensors | (more or {}), folder / "d.safetensors", metadata={KEY: text})
    return folder / "d.safetensors"


CONFIG = {"unet.peft_type": "LORA", "unet.r": 2, "unet.lora_alpha": 3, "unet.target_modules": ["to_q"]}


def test_diffusers_metadata_scales(tmp_path: Path) -> None:
    assert load_adapter(diffusers_file(tmp_path, CONFIG)).sites[Q].scaling == 1.5
    assert (
        load_adapter(diffusers_file(tmp_path, CONFIG | {"unet.use_rslora": True})).sites[Q].scaling
        == 3 / 2**0.5
    )
    without_prefix = {key.removeprefix("unet."): value for key, value in CONFIG.items()}
    assert load_adapter(diffusers_file(tmp_path, without_prefix)).sites[Q].scaling == 1.5
    of_another = {key.replace("unet", "text_encoder"): value for key, value in CONFIG.items()}
    assert load_adapter(diffusers_file(tmp_path, of_another)).sites[Q].scaling == 1.0


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ("{", "no JSON"),
        ("[]", "must hold an object"),
        (CONFIG | {"vae.r": 2}, "vae.r"),
        (CONFIG | {"unet.use_dora": True}, "use_dora"),
        (CONFIG | {"unet.frobnicate": 1}, "frobnicate"),
        (CONFIG | {"unet.r": 3}, "rank 3"),
        (CONFIG | {"unet.target_modules": ["to_k"]}, "does not name it"),
    ],
)
def test_diffusers_metadata_that_does_not_fit_is_refused(
    tmp_path: Path, metadata: dict[str, Any] | str, says: str
) -> None:
    assert says in refusal(diffusers_file(tmp_path, metadata))


def test_two_alphas_are_one_too_many(tmp_path: Path) -> None:
    assert "keep one" in refusal(diffusers_file(tmp_path, CONFIG, {f"unet.{Q}.alpha": torch.tensor(1.0)}))


def test_what_a_format_cannot_say_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    llama = Adapter({"model.layers.0.self_attn.q_proj": pair(2, 1.0)})
    for to in ("kohya", "diffusers"):
        with pytest.raises(AdapterFormatError, match="save as 'peft'"):
            save_adapter(llama, path, to, layout="sd")
    second = Adapter({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1": pair(2, 1.0)})
    with pytest.raises(AdapterFormatError, match="layout 'sd'"):
        save_adapter(second, path, "kohya", layout="sd")
    with pytest.raises(ConfigError, match="layout='sdxl'"):
        save_adapter(Adapter({Q: pair(2, 1.0)}), path, "kohya")
    with pytest.raises(AdapterFormatError, match="not 0"):
        save_adapter(Adapter({Q: pair(2, 0.0)}), path, "kohya", layout="sd")
    with pytest.raises(ConfigError, match="one file"):
        save_adapter(Adapter({Q: pair(2, 1.0)}), tmp_path / "folder", "kohya", layout="sd")
    with pytest.raises(ConfigError, match="unknown format"):
        save_adapter(Adapter({Q: pair(2, 1.0)}), path, "lycoris")  # type: ignore[arg-type]
    assert not path.exists()


def test_what_would_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    adapter = Adapter({Q: pair(2, 1.0)})
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"'.*/file' is a file; give a folder.*\.safetensors"):
        save_adapter(adapter, tmp_path / "file", "diffusers")
    save_adapter(adapter, tmp_path / "peft", "peft")
    other = Adapter({Q: pair(2, 3.0)})
    with pytest.raises(ConfigError, match=r"peft/adapter_config\.json.*would be read instead"):
        save_adapter(other, tmp_path / "peft", "diffusers")
    assert load_adapter(tmp_path / "peft").identity == adapter.identity
    assert not (tmp_path / "peft" / DIFFUSERS_FILE).exists()
    # Of a file that is named, that file is read.
    save_adapter(other, tmp_path / "peft" / "other.safetensors", "diffusers")
    assert load_adapter(tmp_path / "peft" / "other.safetensors").identity == other.identity
    # Where PEFT's files come second, it is they that are read.
    save_adapter(adapter, tmp_path / "lcm", "diffusers")
    save_adapter(other, tmp_path / "lcm", "peft")
    assert load_adapter(tmp_path / "lcm").identity == other.identity


def test_an_adapter_is_taken_apart_by_component() -> None:
    adapter = some_adapter("sdxl")
    parts = components(adapter)
    assert set(parts) == {"unet", "text_encoder", "text_encoder_2"}
    assert Q in parts["unet"].sites
    assert "text_model.encoder.layers.0.mlp.fc1" in parts["text_encoder"].sites
    assert sum(len(part.sites) for part in parts.values()) == len(adapter.sites)
