"""Answers in a given form: which tokens may come next. Knows grammars and tokens, no logits and no requests.

llguidance does the work: it compiles a JSON schema to a grammar and says, token by token, which of the vocabulary can
follow. It comes with `pip install 'manylora[server]'`.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from threading import Lock
from typing import TYPE_CHECKING, Any

from manylora.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

WHITESPACE = r"[\x20\x0A\x0D\x09]{0,64}"
"""What may stand between the parts of JSON: enough for any layout, and an end to it, since models that have nothing to
say go on with blanks until their tokens are used up."""

MAX_COMPILED = 64
"""Compiled forms that are kept for the next request."""

MAX_PARTS_SEARCHED = 200
"""Parts of a bad schema among which the one at fault is looked for."""

MAX_PLACE = 200
"""Characters of the place of a fault that are shown."""


class Guide:
    """The form of one sequence, from its first token on."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> Guide:
        """For another sequence that stands where this one does."""
        return Guide(self._matcher.deep_copy())

    def allowed(self) -> bytes:
        """Which tokens may come next: one bit each, lowest bit first."""
        return self._matcher.compute_bitmask()

    def push(self, token_id: int) -> None:
        """Take the token that came next."""
        self._matcher.consume_token(token_id)

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow but the end."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """Why the form cannot be followed any further; empty if it can."""
        return _reason(self._matcher)


class Guides:
    """Makes guides for one tokenizer. Any thread may call it."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """
        Args:
            vocab_size: of the model, which may have more tokens than its tokenizer.
        """
        self._hf_tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, Guide] = OrderedDict()  # by schema, as text

    def start(self, response_format: Mapping[str, Any]) -> Guide:
        """Return a guide at its beginning. Compiles the schema, or finds it compiled.

        Raises:
            RequestError: the schema is wrong, or asks what cannot be done; the engine has no tokenizer.
            ConfigError: llguidance is not installed.
        """
        schema = schema_of(response_format)
        try:
            key = json.dumps(schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"response_format: the JSON schema is not JSON: {error}") from None
        with self._lock:
            guide = self._compiled.get(key)
        if guide is None:
            guide = self._compile(schema)
        with self._lock:
            self._compiled[key] = guide
            self._compiled.move_to_end(key)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return guide.copy()

    def _compile(self, schema: Mapping[str, Any]) -> Guide:
        try:
            matcher = self._matcher(schema)
        except ValueError as error:
            raise RequestError(f"response_format: the JSON schema cannot be read: {error}") from None
        if matcher.is_error():
            fault = _reason(matcher)
            raise RequestError(f"response_format: the JSON schema{self._place(schema, fault)}: {fault}")
        guide = Guide(matcher)
        guide.allowed()  # some limits are met only when the first tokens are worked out
        if guide.error:
            raise RequestError(f"response_format: the JSON schema asks too much: {guide.error}")
        return guide

    def _place(self, schema: Mapping[str, Any], fault: str) -> str:
        """Where in a schema its fault lies: at the innermost part that has the same fault by itself."""
        paths = []
        for path, part in islice(_parts(schema, ""), MAX_PARTS_SEARCHED):
            with suppress(ValueError):
                if _reason(self._matcher(part)) == fault:
                    paths.append(path)
        place = max(paths, key=len, default="")
        # A schema may be as deep as its writer likes; where the fault lies is at the end.
        return f" at '{place[-MAX_PLACE:]}'" if place else ""

    def _matcher(self, schema: Mapping[str, Any]) -> LLMatcher:
        """A matcher, in error if the schema is wrong. Raises ValueError for one that cannot even be read."""
        tokenizer = self._ready_tokenizer()
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(
            dict(schema), overrides={"whitespace_pattern": WHITESPACE}
        )
        return LLMatcher(tokenizer, grammar, log_level=0)

    def _ready_tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance has it; made once, in about a second."""
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise ConfigError(
                "response_format needs llguidance, which is not installed; pip install 'manylora[server]'"
            ) from error
        if self._hf_tokenizer is None:
            raise RequestError("response_format needs a tokenizer, and this engine has none")
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = from_tokenizer(
                    self._hf_tokenizer,
                    n_vocab=max(self._vocab_size, len(self._hf_tokenizer)),
                    eos_token=self._eos_token_ids or None,
                )
            return self._tokenizer


def schema_of(response_format: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the JSON schema of a response_format: {"type": "json_object"}, or {"type": "json_schema", "json_schema":
    {"schema": {..}}}.

    Raises:
        RequestError: it is neither; says what was expected and what came.
    """
    match response_format:
        case {"type": "json_object", **rest} if not rest:
            return {"type": "object"}
        case {
            "type": "json_schema",
            "json_schema": {"schema": Mapping() as schema, **inner},
            **outer,
        } if not (inner or outer):
            return schema
    raise RequestError(
        'sampling parameter response_format: expected {"type": "json_object"} or '
        f'{{"type": "json_schema", "json_schema": {{"schema": {{..}}}}}}, got {response_format!r}'
    )


def _parts(value: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every object inside a schema, with the JSON pointer to it."""
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, part in items:
        here = f"{path}/{key}"
        if isinstance(part, Mapping):
            yield here, part
        yield from _parts(part, here)


def _reason(matcher: LLMatcher) -> str:
    """What is wrong, on one line and without the state of the parser that follows; empty if nothing is."""
    return " ".join(matcher.get_error().partition("<state>")[0].split())
