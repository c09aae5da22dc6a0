"""Tokenizers of the kinds that language models use, trained on a few lines in a few milliseconds."""

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LINES = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not.",
    "Grüße aus München: 5 € für drei Brötchen, naïve façade, Привет мир",
    "emoji 😀 👩‍👩‍👧 and 日本語 text",
]


@cache
def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen and SmolLM2: a token is any bytes, so a character may be split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


@cache
def byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral: words begin with "▁", unknown characters become runs of byte tokens."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    characters = ["▁", *"abcdefghijklmnopqrstuvwxyzTGMP.,;:5"]
    merges = [
        ("▁", "t"),
        ("▁t", "h"),
        ("▁th", "e"),
        ("o", "x"),
        ("▁", "▁"),
        ("d", "o"),
        ("▁", "do"),
        ("▁do", "g"),
    ]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *characters, *("".join(merge) for merge in merges)]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    """As T5 and XLM-R: words begin with "▁", unknown characters are lost."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "metaspace": metaspace}
