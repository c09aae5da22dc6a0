"""Write the demo model as checkpoints are mostly kept, in bfloat16: python scripts/bfloat16_checkpoint.py FOLDER

A transformers folder. The packaged file is of four and eight bits, whose values take two or three bfloat16 each; so a
benchmark of this folder is one of the products that most checkpoints get. Does nothing where the folder is there.
"""

import sys
from pathlib import Path

import torch

from manylora.models.convert import write_hf
from manylora.models.demo_model import DEMO_MODEL
from manylora.models.gguf import GgufModel
from manylora.models.locate import locate
from manylora.models.tokenizer import load_tokenizer


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    if folder.is_dir():
        return
    files = locate(DEMO_MODEL)
    assert files.gguf is not None
    model = GgufModel(files.gguf, name=files.name)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in model.tensors()}
    write_hf(folder, model.config, tensors, load_tokenizer(DEMO_MODEL))


if __name__ == "__main__":
    main()
