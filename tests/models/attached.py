"""Small models with PEFT adapters, and what PEFT says that each row of a batch should give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from manylora.lora.mixture import Mixture, MixtureLike
from tests.models.oracle import with_exact_norms

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One kind of model: how it is made and fed, and the adapters that PEFT makes for it."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    output: Callable[[Any], Tensor]
    adapters: Mapping[str, dict[str, Any]]


def encoder() -> nn.Module:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model: nn.Module = BertModel(config)
    return model


def decoder() -> nn.Module:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return with_exact_norms(LlamaForCausalLM(config))


def unet() -> nn.Module:
    model: nn.Module = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=2,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return model


def token_inputs(num_rows: int) -> Inputs:
    """Of every other row the last two tokens are padding."""
    mask = torch.ones(num_rows, 7, dtype=torch.long)
    mask[::2, 5:] = 0
    return {"input_ids": torch.randint(0, 50, (num_rows, 7)), "attention_mask": mask}


def image_inputs(num_rows: int) -> Inputs:
    return {
        "sample": torch.randn(num_rows, 4, 8, 8),
        "timestep": torch.arange(num_rows) * 37 + 5,
        "encoder_hidden_states": torch.randn(num_rows, 3, 8),
    }


def lora(targets: str, rank: int, alpha: float, **settings: Any) -> dict[str, Any]:
    """Arguments of LoraConfig. targets: module names, or "all-linear"."""
    target_modules = targets if targets == "all-linear" else targets.split()
    return {"target_modules": target_modules, "r": rank, "lora_alpha": alpha, **settings}


# Every scaling is a power of two: kernels take it in float32, which must hold it exactly to compare in float64.
CASES = {
    "encoder": Case(
        encoder,
        token_inputs,
        lambda out: torch.cat([out.last_hidden_state, out.pooler_output[:, None]], dim=1),
        {
            "plain": lora("query value", 4, 4),
            "rslora": lora("key dense", 16, 4, use_rslora=True),
            "ranks": lora("query dense", 2, 4, rank_pattern={"query": 8, "output.dense": 1}),
            "one layer": lora("value", 1, 8, layers_to_transform=[1]),
        },
    ),
    "decoder": Case(
        decoder,
        token_inputs,
        lambda out: out.logits,
        {
            "plain": lora("q_proj v_proj", 4, 4),
            "all": lora("all-linear", 2, 1),
            "rslora": lora("gate_proj up_proj down_proj", 4, 1, use_rslora=True),
            "ranks": lora("o_proj k_proj", 1, 2, rank_pattern={"layers.1.self_attn.o_proj": 16}),
        },
    ),
    "unet": Case(
        unet,
        image_inputs,
        lambda out: out.sample,
        {
            "attention": lora("to_q to_v to_out.0", 4, 4),
            "convs": lora("conv1 conv2 downsamplers.0.conv upsamplers.0.conv", 2, 1),
            "1x1": lora("proj_in proj_out conv_shortcut", 4, 2, use_rslora=True),
            "mixed": lora(
                "conv_in conv_out to_k time_emb_proj linear_1", 2, 2, rank_pattern={"to_k": 8, "conv_in": 1}
            ),
        },
    ),
}


class Trained:
    """A base, PEFT's model with all adapters of its case, and the folder to which PEFT saved them in float32."""

    def __init__(self, case: Case, folder: Path) -> None:
        torch.manual_seed(1)
        self.case = case
        self.folder = folder
        base = case.make().eval()
        for parameter in base.parameters():
            # Models start with zero biases and small weights; here every layer is to matter.
            if parameter.dim() < 2:
                nn.init.normal_(parameter, mean=float(parameter.mean() > 0.5), std=0.2)
        first, *others = case.adapters
        peft = get_peft_model(copy.deepcopy(base), LoraConfig(**case.adapters[first]), adapter_name=first)
        for name in others:
            peft.add_adapter(name, LoraConfig(**case.adapters[name]))
        for key, parameter in peft.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.3)
        peft.save_pretrained(folder)
        self._base, self._peft = base, peft.eval()

    @cache  # noqa: B019  # as many as there are dtypes
    def base(self, dtype: torch.dtype) -> nn.Module:
        return copy.deepcopy(self._base).to(dtype)

    @cache  # noqa: B019
    def peft(self, dtype: torch.dtype) -> PeftModel:
        return copy.deepcopy(self._peft).to(dtype)

    def inputs(self, num_rows: int, dtype: torch.dtype = torch.float32) -> Inputs:
        torch.manual_seed(2)
        inputs = self.case.inputs(num_rows)
        return {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}

    @torch.inference_mode()
    def run(self, model: nn.Module, inputs: Inputs) -> Tensor:
        return self.case.output(model(**inputs))

    def expected_row(self, inputs: Inputs, row: int, mixture: MixtureLike, dtype: torch.dtype) -> Tensor:
        """One row alone: the base, PEFT with its one adapter active, or the base plus the sum of PEFT's deltas."""
        alone = {key: x[row : row + 1] for key, x in inputs.items()}
        weights = Mixture.parse(mixture).weights
        if not weights:
            return self.run(self.base(dtype), alone)
        if len(weights) == 1 and weights[0][1] == 1:
            model = self.peft(dtype)
            model.set_adapter(weights[0][0])
            return self.run(model, alone)
        return self.run(self.merged(Mixture.parse(mixture), dtype), alone)

    @cache  # noqa: B019
    def merged(self, mixture: Mixture, dtype: torch.dtype) -> nn.Module:
        merged = copy.deepcopy(self._base).double()
        layers = dict(self.peft(torch.float64).named_modules())
        for site, module in merged.named_modules():
            layer = layers.get(f"base_model.model.{site}")
            if isinstance(layer, LoraLayer):
                for name, weight in mixture.weights:
                    if name in layer.lora_A:
                        module.weight.data += weight * layer.get_delta_weight(name)
        return merged.to(dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference, in units of the deviation of what is wanted."""
    return float((got.double() - want.double()).abs().max() / want.double().std())
