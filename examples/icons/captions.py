"""The tokenizer of the base: CLIP's kind, with a vocabulary learnt from the captions that can be written.

Every word of a caption is one token; any other text falls into pieces, down to bytes, and never into an unknown.
"""

import json
from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from icons.vocabulary import SUBJECTS

MAX_TOKENS = 16
"""Positions of the text encoder; the longest caption takes 6."""

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer() -> CLIPTokenizer:
    """Learn the vocabulary from the subjects' names and return the tokenizer."""
    learner = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = sorted({word for s in SUBJECTS for word in s.with_article.split()})
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,  # never reached: merging ends when every word is whole
        special_tokens=[_BOS, _EOS, *(a + b for a, b in product(alphabet, ("", "</w>")))],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(words, trainer)
    learnt = json.loads(learner.to_str())["model"]
    # transformers 5 takes neither the ids nor the length from the vocabulary: without them padding and cutting are
    # silently those of CLIP's own tokenizer.
    return CLIPTokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_EOS,
        model_max_length=MAX_TOKENS,
    )


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> NDArray[np.int64]:
    """Return [len(captions), MAX_TOKENS], padded as the pipeline pads."""
    encoded = tokenizer(list(captions), padding="max_length", max_length=MAX_TOKENS, truncation=True)
    return np.asarray(encoded["input_ids"], dtype=np.int64)
