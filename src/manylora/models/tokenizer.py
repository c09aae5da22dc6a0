"""The tokenizer that belongs to a model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from manylora.errors import ModelError
from manylora.models.gguf_tokenizer import tokenizer_from_gguf
from manylora.models.locate import locate


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of the model that `source` names (see locate.locate).

    Which tokens end an answer is not the tokenizer's to say: LlamaConfig.eos_token_ids has them all.
    Raises:
        ModelError: no such model, or no tokenizer with it.
    """
    files = locate(source)
    if files.gguf is not None:
        return tokenizer_from_gguf(files.gguf, name=files.name)
    try:
        return AutoTokenizer.from_pretrained(files.directory, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"model '{files.name}': no tokenizer could be loaded: {reason}") from error
