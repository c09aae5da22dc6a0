"""How the tokens of one request are chosen, and when they end. Knows no tokenizer, tensor or model.

Names and meanings are those of the OpenAI API and of vLLM; where transformers defines the same thing
(temperature, top_k, top_p, min_p, repetition_penalty), the numbers are those of its logits processors.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from manylora.errors import RequestError
from manylora.text.guide import schema_of

GREEDY_BELOW = 1e-5
"""Temperatures under this count as 0: softmax(logits / temperature) is then a step for practical logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """What a request asks of sampling. Lists become tuples; everything is checked when it is made.

    Raises:
        RequestError: a value of the wrong type or out of range; names the field, what it takes, what came.
    """

    max_tokens: int | None = None
    """Most tokens to generate; None: until the model stops or its context is full."""

    min_tokens: int = 0
    """Until so many tokens exist, no end or stop token is chosen and no stop string ends the text."""

    temperature: float = 1.0
    """Logits are divided by it. 0 is greedy: the largest logit wins; seed and filters have no effect."""

    top_k: int = 0
    """Keep the k most likely tokens, and those equal to the k-th; 0 keeps all."""

    top_p: float = 1.0
    """Keep the most likely tokens up to the one with which their probabilities reach top_p; 1 keeps all."""

    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the most likely one; 0 keeps all."""

    seed: int | None = None
    """Random numbers come from (seed, sample, output position) alone, so that a request gives the same
    tokens in any batch, preempted or not. None: a new seed for each request."""

    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or the output are divided by it if positive, else multiplied (CTRL,
    Keskar et al. 2019). 1 is off."""

    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the output holds."""

    frequency_penalty: float = 0.0
    """Subtracted from the logit of each token as many times as the output holds it."""

    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of these tokens after the penalties, each from -100 to 100: about 5 changes how often a token
    comes; 100 all but forces it, -100 all but bans it."""

    stop: Sequence[str] = ()
    """Strings that end the text; the text is cut before the earliest one. A str means one string."""

    stop_token_ids: Sequence[int] = ()
    """Tokens that end the text, beside the model's own end-of-text tokens."""

    ignore_eos: bool = False
    """Take the model's end-of-text tokens for ordinary ones; stop and stop_token_ids still hold."""

    include_stop_str_in_output: bool = False
    """Leave the stop string, or the text of the stop token, at the end of the text."""

    skip_special_tokens: bool = True
    """Special tokens (<|im_end|>, ..) give no text."""

    logprobs: int | None = None
    """Return the log-probability of each sampled token and of so many most likely ones; 0: the sampled
    alone. They are those of the model itself, before penalties, temperature and filters."""

    response_format: Mapping[str, Any] | None = field(default=None, hash=False)
    """What the text must be: {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema": {..}}}. It
    ends when that is complete, whatever min_tokens says; max_tokens or a stop string may cut it short."""

    n: int = 1
    """Samples drawn from the same prompt, each with random numbers of its own."""

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        for name, low, high in _INTEGERS:
            _check_integer(name, getattr(self, name), low, high)
        for name, lowest, highest in _NUMBERS:
            _check_number(name, getattr(self, name), lowest, highest)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, "true or false", getattr(self, name))
        if self.top_p == 0:
            _refuse("top_p", "a number above 0 and at most 1", self.top_p)
        for string in self.stop:
            if not isinstance(string, str) or not string:
                _refuse("stop", "strings that are not empty", string)
        object.__setattr__(self, "logit_bias", _as_bias(self.logit_bias))
        if self.response_format is not None:
            schema_of(self.response_format)
        for token_id in self.stop_token_ids:
            _check_integer("stop_token_ids", token_id, 0, None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", f"at most max_tokens, {self.max_tokens}", self.min_tokens)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """Make params from names and values.

        Raises:
            RequestError: a name that is no field; says which are.
        """
        known = [one.name for one in fields(cls)]
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise RequestError(f"unknown sampling parameters {unknown}; known: {known}")
        return cls(**values)


_OPTIONAL = frozenset({"max_tokens", "seed", "logprobs"})

_INTEGERS: tuple[tuple[str, int, int | None], ...] = (  # field, smallest, largest (None: no bound)
    ("max_tokens", 1, None),
    ("min_tokens", 0, None),
    ("top_k", 0, None),
    ("seed", -(2**63), 2**64 - 1),
    ("logprobs", 0, None),
    ("n", 1, None),
)

# The bounds of temperature and repetition_penalty keep fp32 logits finite; sensible values lie far inside.
_NUMBERS: tuple[tuple[str, float, float], ...] = (  # field, smallest, largest
    ("temperature", 0.0, 1000.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Iterable):
        return tuple(value)
    _refuse(name, "a list", value)


def _as_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        _refuse("logit_bias", "token ids with a number each", value)
    for token_id, bias in value.items():
        _check_integer("logit_bias", token_id, 0, None)
        _check_number("logit_bias", bias, -100.0, 100.0)
    return dict(value)


def _check_integer(name: str, value: Any, low: int, high: int | None) -> None:
    if value is None and name in _OPTIONAL:
        return
    # bool is an int to Python; True as a count is a mistake of the caller.
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        off = " (0 switches it off)" if name == "top_k" else ""
        _refuse(name, f"an integer {bounds}{off}" + (" or none" if name in _OPTIONAL else ""), value)


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # false for NaN too
        _refuse(name, f"a number from {low:g} to {high:g}", value)


def _refuse(name: str, expected: str, got: object) -> NoReturn:
    raise RequestError(f"sampling parameter {name}: expected {expected}, got {got!r}")
