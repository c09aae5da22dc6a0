"""Turns what a caller asks into a request, or refuses it. Runs on the caller's thread and changes nothing."""

import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from itertools import count
from typing import Any

from jinja2 import TemplateError

from manylora.errors import CapacityError, RequestError
from manylora.lora.library import Library
from manylora.lora.mixture import Mixture, MixtureLike
from manylora.lora.reader import AdapterRef
from manylora.models.config import LlamaConfig
from manylora.text.params import SamplingParams
from manylora.text.sequence import Request

Prompt = str | SequenceOf[int] | SequenceOf[Mapping[str, str]]
"""Text; token ids; or chat messages [{"role": .., "content": ..}], which the tokenizer's chat template renders."""


class Intake:
    """Knows the limits of model and pool, and where names are looked up."""

    def __init__(
        self,
        config: LlamaConfig,
        tokenizer: Any,
        library: Library,
        *,
        num_pages: int,
        page_tokens: int,
        page_bytes: int,
        int8_adapters: bool = False,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._library = library
        self._num_pages = num_pages
        self._page_tokens = page_tokens
        self._page_bytes = page_bytes
        self._int8_adapters = int8_adapters
        self._arrivals = count()

    def requests(
        self,
        prompts: SequenceOf[Prompt],
        params: SamplingParams,
        mixture: MixtureLike,
        request_ids: SequenceOf[str | None],
        *,
        tenant: str,
        deadline_s: float | None,
    ) -> list[Request]:
        """Make a request of each prompt; names are looked up once for all of them.

        Args:
            request_ids: one for each prompt; None chooses it.
            deadline_s: seconds from now by which the first token is wanted.
        Raises:
            RequestError: a prompt that is empty, longer than the context or refused by the tokenizer; a mixture or
                option that makes no sense.
            AdapterNotFoundError: a name that the library does not hold.
            CapacityError: more tokens, or larger adapters, than the whole pool can hold.
        """
        now = time.monotonic()
        if deadline_s is not None and not deadline_s > 0:  # so written, it refuses NaN too
            raise RequestError(f"deadline_s must be a number of seconds above 0, got {deadline_s}")
        self._check_ids(params)
        tokenized = [self.tokenize(prompt) for prompt in prompts]
        parsed = Mixture.parse(mixture)
        adapters = tuple((self._library.locate(name), weight) for name, weight in parsed.weights)
        # Two names may point at the same content, which takes pages once.
        refs = list({self._library.identity(ref) or ref: ref for ref, _ in adapters}.values())
        requests = []
        for tokens, request_id in zip(tokenized, request_ids, strict=True):
            max_tokens = self._max_tokens(len(tokens), params.max_tokens, refs)
            arrival = next(self._arrivals)
            requests.append(
                Request(
                    request_id=request_id or f"request-{arrival}",
                    arrival=arrival,
                    prompt=tuple(tokens),
                    params=params,
                    max_tokens=max_tokens,
                    mixture=parsed,
                    adapters=adapters,
                    tenant=tenant,
                    submitted_at=now,
                    deadline=None if deadline_s is None else now + deadline_s,
                )
            )
        return requests

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            RequestError: the prompt is empty, holds ids outside the vocabulary, needs a tokenizer or chat template that
                is not there, or is refused by it.
        """
        tokens = self._encode(prompt)
        if not tokens:
            raise RequestError("the prompt is empty; it must have at least one token")
        vocab_size = self._config.vocab_size
        for token in tokens:
            if not isinstance(token, int) or not 0 <= token < vocab_size:
                raise RequestError(
                    f"prompt token {token!r} is no id of the vocabulary, 0 to {vocab_size - 1}"
                )
        return tokens

    def _check_ids(self, params: SamplingParams) -> None:
        for name, token_ids in {
            "stop_token_ids": params.stop_token_ids,
            "logit_bias": params.logit_bias,
        }.items():
            for token_id in token_ids:
                if token_id >= self._config.vocab_size:
                    raise RequestError(
                        f"{name}: {token_id} is no id of the vocabulary, 0 to {self._config.vocab_size - 1}"
                    )

    def _encode(self, prompt: Prompt) -> list[int]:
        is_chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        if not isinstance(prompt, str) and not is_chat:
            return list(prompt)  # type: ignore[arg-type]  # ids, as far as tokenize() finds no fault with them
        if self._tokenizer is None:
            raise RequestError("this engine has no tokenizer; give the prompt as token ids")
        if is_chat and self._tokenizer.chat_template is None:
            raise RequestError(
                "the model has no chat template, which messages need; give the prompt as plain text "
                "(manylora complete: --raw)"
            )
        try:
            tokens: list[int] = (
                self._tokenizer.apply_chat_template(
                    prompt, add_generation_prompt=True, tokenize=True, return_dict=False
                )
                if is_chat
                else self._tokenizer.encode(prompt)
            )
        except (TemplateError, ValueError, TypeError) as error:
            refusing = "chat template" if is_chat else "tokenizer"
            raise RequestError(f"the model's {refusing} refuses the prompt: {error}") from error
        return tokens

    def _max_tokens(self, num_prompt: int, asked: int | None, refs: list[AdapterRef]) -> int:
        """Return how many tokens the request may have, once context and pool are known to hold it."""
        context_left = self._config.max_position - num_prompt
        if context_left < (asked or 1):
            raise RequestError(
                f"a prompt of {num_prompt} tokens and {asked or 1} to generate exceed the {self._config.max_position} "
                f"tokens of the model's context"
            )
        # What lies in files is about what lies in pages; of adapters that are rounded, a quarter at least. Refused is
        # what cannot fit even so; the scheduler checks again, exactly.
        most, least = (self._pages_of(refs, shrinks) for shrinks in (1, 4 if self._int8_adapters else 1))
        pool_left = (self._num_pages - least) * self._page_tokens - num_prompt
        if pool_left < (asked or 1):
            raise CapacityError(
                f"a prompt of {num_prompt} tokens, {asked or 1} to generate and adapters of {least} pages can "
                f"never fit: the whole pool has {self._num_pages} pages of {self._page_tokens} tokens or "
                f"{self._page_bytes} bytes; ask for less, or give the pool more memory"
            )
        # A page less for each adapter and the last token, since the estimate may be short by so much.
        spare = (1 + len(refs) + most - least) * self._page_tokens if asked is None else 0
        return asked or max(1, min(context_left, pool_left - spare))

    def _pages_of(self, refs: list[AdapterRef], shrinks: int) -> int:
        """Pages of adapters of which one byte in `shrinks` is left."""
        return sum(-(-ref.num_bytes // (shrinks * self._page_bytes)) for ref in refs)
