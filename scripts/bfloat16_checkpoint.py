"""Write the demo model as checkpoints are mostly kept, in bfloat16: python scripts/bfloat16_checkpoint.py FOLDER

A transformers folder. The packaged file is of four and eight bits, whose values take two or three bfloat16 each; so a
benchmark of this folder is one of the products that most checkpoints get. Does nothing where the folder is there.
"""

import sys
from pathlib import Path

import torch

from manylora.models.convert import save_hf
from manylora.models.demo_model import DEMO_MODEL


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    if not folder.is_dir():
        save_hf(DEMO_MODEL, folder, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
