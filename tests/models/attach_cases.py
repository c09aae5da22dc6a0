"""Models of three libraries, adapters that PEFT makes for them, and what PEFT says their outputs are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from tests.models.oracle import with_exact_norms

Inputs = dict[str, Tensor]


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    model: nn.Module = BertModel(config)
    return model


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return with_exact_norms(LlamaForCausalLM(config))


def unet() -> nn.Module:
    model: nn.Module = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return model


def sentences(num_rows: int, dtype: torch.dtype) -> Inputs:
    """Token ids of length 5; of every other row the last two are padding."""
    mask = torch.ones(num_rows, 5, dtype=torch.long)
    mask[::2, 3:] = 0
    return {"input_ids": torch.randint(0, 31, (num_rows, 5)), "attention_mask": mask}


def noisy_images(num_rows: int, dtype: torch.dtype) -> Inputs:
    return {
        "sample": torch.randn(num_rows, 4, 8, 8).to(dtype),
        "timestep": torch.arange(num_rows) * 7,
        "encoder_hidden_states": torch.randn(num_rows, 3, 8).to(dtype),
    }


@dataclass(frozen=True)
class Case:
    """A model, and the settings of four adapters for it. Ranks and alphas make every scaling exact in float32."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.dtype], Inputs]
    adapters: Mapping[str, Mapping[str, Any]]


CASES = {
    "bert": Case(
        bert,
        sentences,
        {
            "plain": {"target_modules": ["query", "value"], "r": 4, "lora_alpha": 6},
            "rslora": {
                "target_modules": ["query", "key", "pooler.dense"],
                "r": 16,
                "lora_alpha": 5,
                "use_rslora": True,
            },
            "pattern": {
                "target_modules": "all-linear",
                "r": 2,
                "lora_alpha": 3,
                "rank_pattern": {"query": 4, r"layer\.1\.output\.dense": 8},
            },
            "other": {"target_modules": ["intermediate.dense"], "r": 1, "lora_alpha": 2},
        },
    ),
    "llama": Case(
        llama,
        sentences,
        {
            "plain": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6},
            "rslora": {
                "target_modules": ["q_proj", "o_proj", "down_proj"],
                "r": 16,
                "lora_alpha": 5,
                "use_rslora": True,
            },
            "pattern": {
                "target_modules": "all-linear",
                "r": 2,
                "lora_alpha": 3,
                "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.up_proj": 8},
            },
            "other": {"target_modules": ["gate_proj"], "layers_to_transform": [1], "r": 1, "lora_alpha": 2},
        },
    ),
    "unet": Case(
        unet,
        noisy_images,
        {
            "plain": {"target_modules": ["to_q", "to_v", "proj_in"], "r": 4, "lora_alpha": 6},
            "rslora": {
                "target_modules": ["conv1", "conv2", "to_q", "ff.net.2"],
                "r": 4,
                "lora_alpha": 5,
                "use_rslora": True,
            },
            "pattern": {
                "target_modules": ["conv1", "conv_shortcut", "conv_in", "conv_out", "time_emb_proj", "to_out.0"],
                "r": 2,
                "lora_alpha": 3,
                "rank_pattern": {"conv1": 4, r"mid_block\..*\.conv1": 8},
            },
            "other": {
                "target_modules": ["downsamplers.0.conv", "upsamplers.0.conv", "linear_1"],
                "r": 1,
                "lora_alpha": 2,
            },
        },
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Oracle:
    """A model, the same one with adapters under PEFT, and the folder that PEFT saved these to."""

    case: Case
    base: nn.Module
    peft: PeftModel
    folder: Path

    def expected(self, mixture: Mapping[str, float], inputs: Inputs) -> Tensor:
        """What PEFT gives for a mixture: of one adapter at weight 1 as it runs it, of others as the merged sum."""
        if list(mixture.values()) == [1.0]:
            self.peft.set_adapter(next(iter(mixture)))
            return output_of(self.peft, inputs)
        return output_of(self.merged(mixture), inputs)

    def merged(self, mixture: Mapping[str, float]) -> nn.Module:
        """The base with the float64 sum of weighted deltas added to its weights."""
        model = deepcopy(self.base)
        for name, layer in self.peft.named_modules():
            if isinstance(layer, LoraLayer):
                weight = model.get_parameter(name.removeprefix("base_model.model.") + ".weight")
                named = [adapter for adapter in mixture if adapter in layer.lora_A]
                if not named:
                    continue
                double, total = deepcopy(layer).double(), weight.detach().double()
                for adapter in named:
                    total = total + mixture[adapter] * double.get_delta_weight(adapter).detach()
                weight.data = total.to(weight.dtype)
        return model

    def to(self, dtype: torch.dtype) -> Oracle:
        return Oracle(self.case, deepcopy(self.base).to(dtype), deepcopy(self.peft).to(dtype), self.folder)


def make_oracle(case: Case, folder: Path) -> Oracle:
    """Build the model, train its adapters (that is, give them random non-zero weights), save them."""
    torch.manual_seed(0)
    base = case.build().eval()
    configs = {name: LoraConfig(**settings) for name, settings in case.adapters.items()}
    first, *others = configs
    peft = get_peft_model(deepcopy(base), configs[first], adapter_name=first)
    for name in others:
        peft.add_adapter(name, configs[name])
    for key, parameter in peft.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.3)
    peft.save_pretrained(folder)
    return Oracle(case, base, peft.eval(), folder)


@torch.inference_mode()
def output_of(model: nn.Module, inputs: Inputs) -> Tensor:  # [N, ...]
    """The first output, and of an encoder what it pools too: [N, *]."""
    outputs = model(**inputs, return_dict=False)
    return torch.cat([out.flatten(1) for out in outputs], dim=1)


def rows_of(inputs: Inputs, begin: int, end: int) -> Inputs:
    return {name: value[begin:end] for name, value in inputs.items()}


def fingerprint(model: nn.Module) -> str:
    """A hash of every parameter and buffer with its name."""
    digest = hashlib.sha256()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(name.encode())
        digest.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
