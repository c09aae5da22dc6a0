"""A tokenizer from GGUF metadata.

Byte-level vocabularies are built here: transformers' own conversion splits text before merging as GPT-2 does
whatever the file says, which for SmolLM2 turns "\\n\\n1." into other tokens than the model was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from manylora.errors import ModelError
from manylora.models.gguf_file import GgufFile

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type of tokens that are matched whole

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_from_gguf(path: Path, *, name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer that a GGUF file describes, with its special tokens and chat template.

    Raises:
        ModelError: a kind of vocabulary, or a way to split text, that is not read here.
    """
    metadata = GgufFile(path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":  # sentencepiece
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if kind != "gpt2":
        raise ModelError(f"model '{name}': tokenizer.ggml.model is {kind!r}; accepted: gpt2, llama")
    return _byte_level(metadata, name)


def _byte_level(metadata: Mapping[str, Any], name: str) -> PreTrainedTokenizerFast:
    lacking = [key for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges") if key not in metadata]
    if lacking:
        raise ModelError(f"model '{name}': the GGUF lacks {' and '.join(lacking)}")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    splitter, adds_bos = _splitter(metadata.get("tokenizer.ggml.pre"), name)
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    special = _special_tokens(metadata, tokens)
    if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    control = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    user_defined = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in user_defined])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _splitter(pre: str | None, name: str) -> tuple[pre_tokenizers.PreTokenizer, bool]:
    """How text is cut before merging, and whether a text begins with the BOS token where the file does not say."""
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]), False
    if pre == "llama-bpe":
        words = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([words, byte_level]), True
    raise ModelError(
        f"model '{name}': tokenizer.ggml.pre is {pre!r}; accepted: smollm, llama-bpe "
        "(other models as a transformers directory)"
    )


def _special_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in keys.items()}
    return {role: tokens[token_id] for role, token_id in ids.items() if token_id is not None}
