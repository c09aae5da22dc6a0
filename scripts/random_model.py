"""Make a model of given sizes with random weights: as fast as a real one of its sizes, for who times steps.

python scripts/random_model.py SIZES FOLDER      SIZES: one of those below
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "random-60m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 16_000,
    },
    "random-360m": {  # as SmolLM2-360M
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "vocab_size": 49_152,
    },
}

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SIZES:
        sys.exit(f"{__doc__}\n{', '.join(SIZES)}")
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES[sys.argv[1]], max_position_embeddings=8192, tie_word_embeddings=True, dtype="bfloat16"
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(Path(sys.argv[2]))
