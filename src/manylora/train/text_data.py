"""Rows as tokens with the answer marked, and batches of them. Knows a tokenizer, no model.

The loss counts what the assistant says, up to and with its end token, or the completion; nothing else.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from manylora.errors import DataError
from manylora.train.text_rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a position that the loss does not count; torch's cross_entropy knows it
# Rows are put in order of length within this many batches' worth of shuffled rows: little padding, order still random.
_SORT_BATCHES = 16


@dataclass(frozen=True)
class Example:
    """One row: `tokens` and, for each, whether the loss counts its prediction."""

    tokens: tuple[int, ...]
    is_target: tuple[bool, ...]


@dataclass
class Dataset:
    """Examples that can be trained on, and what became of the rows that could not be taken as they were."""

    examples: list[Example] = field(default_factory=list)
    num_truncated: int = 0
    num_dropped: int = 0

    @property
    def num_target_tokens(self) -> int:
        return sum(sum(example.is_target) for example in self.examples)


@dataclass(frozen=True)
class Batch:
    """Rows of similar length, padded on the right."""

    tokens: Tensor  # [N, L] int64
    attention_mask: Tensor  # [N, L] int64, 1 for tokens, 0 for padding
    labels: Tensor  # [N, L] int64, labels[n, i] = the token that follows i, IGNORED where the loss does not count

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORED).sum())


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int,
    overlong: Literal["truncate", "drop"],
) -> Dataset:
    """Tokenize rows. One longer than `max_tokens` is cut at its end or dropped; without a target left, dropped.

    Raises:
        DataError: the tokenizer has no end token, or no chat template that a row of a chat could be put into.
    """
    if tokenizer.eos_token is None:
        raise DataError("the tokenizer names no end token (eos_token), so no answer could be taught to end")
    dataset = Dataset()
    for row in rows:
        tokens, is_target = _tokenize_row(row, tokenizer)
        is_overlong = len(tokens) > max_tokens
        if is_overlong and (overlong == "drop" or not any(is_target[1:max_tokens])):
            dataset.num_dropped += 1
            continue
        dataset.num_truncated += is_overlong
        dataset.examples.append(Example(tuple(tokens[:max_tokens]), tuple(is_target[:max_tokens])))
    return dataset


def plan_batches(lengths: Sequence[int], batch_rows: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of an epoch as row indices: a pure function of its arguments, each row once.

    Rows of similar length share a batch, and the batches come in random order.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    window = batch_rows * _SORT_BATCHES
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        rows = sorted(order[start : start + window], key=lambda row: lengths[row])
        batches += [rows[i : i + batch_rows] for i in range(0, len(rows), batch_rows)]
    rng.shuffle(batches)
    return batches


def make_batch(examples: Sequence[Example], pad_token: int, device: torch.device) -> Batch:
    """Pad examples to the longest of them."""
    longest = max(len(example.tokens) for example in examples)
    tokens = torch.full((len(examples), longest), pad_token, dtype=torch.int64)
    attention_mask = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, IGNORED)
    for row, example in enumerate(examples):
        num_tokens = len(example.tokens)
        tokens[row, :num_tokens] = torch.tensor(example.tokens)
        attention_mask[row, :num_tokens] = 1
        # Position i predicts token i + 1, so the labels are shifted here, once.
        following = torch.tensor(example.tokens[1:])
        labels[row, : num_tokens - 1] = following.masked_fill(~torch.tensor(example.is_target[1:]), IGNORED)
    return Batch(tokens.to(device), attention_mask.to(device), labels.to(device))


def _tokenize_row(row: Row, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[bool]]:
    if "prompt" in row:
        # Raw text: special tokens are what the tokenizer adds to any text, and an end token after the completion.
        prompt = tokenizer(row["prompt"]).input_ids
        completion = tokenizer(row["completion"], add_special_tokens=False).input_ids
        completion.append(tokenizer.eos_token_id)
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)
    tokens: list[int] = []
    is_target: list[bool] = []
    for text, target in _chat_spans(row["messages"], tokenizer):
        # Span by span, because that is how an engine meets the text: the prompt is tokenized before an answer exists.
        span = tokenizer(text, add_special_tokens=False).input_ids
        tokens += span
        is_target += [target] * len(span)
    return tokens, is_target


def _chat_spans(
    messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[str, bool]]:
    """Render a chat and yield (text, is it the assistant's) in order, up to the last end token."""
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template; give rows of 'prompt' and 'completion' instead of chats"
        )
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not prompt.startswith(done) or not answered.startswith(prompt):
            raise DataError(
                "the chat template rewrites earlier turns, so an answer cannot be told from its prompt"
            )
        yield prompt[len(done) :], False
        # What the template puts after the end token (a newline) is no part of the answer: generation has stopped.
        answer, end, _ = answered[len(prompt) :].partition(tokenizer.eos_token)
        yield answer + end, True
        done = prompt + answer + end
