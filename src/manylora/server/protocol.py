"""The bodies that clients send: every field, its type and its bounds. Nothing is accepted and ignored.

Fields of OpenAI's API keep its names and meanings, further sampling options those of vLLM; tests/server/fields.json has
all. A field that is not here, or that stands in unsupported.py, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from manylora.server.body import (
    MAX_INTEGER,
    MAX_LOGPROBS,
    MAX_SAMPLES,
    MAX_SAMPLES_OF_ALL,
    MAX_SCHEMA_DEPTH,
    Bias,
    BiasKey,
    Body,
    Count,
    Finite,
    NonEmpty,
    Seconds,
    Text,
    TokenId,
)
from manylora.server.unsupported import UnsupportedOfChat, UnsupportedOfCompletions, UnsupportedOfMessages

TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
"""Of a million wrong items, the first says it all."""


class LoraTerm(Body):
    """One adapter of a mixture."""

    name: NonEmpty
    weight: Finite = 1.0


class StreamOptions(Body):
    include_usage: bool = False
    """Send the counts of tokens in an event of their own, the last one."""


class JsonSchema(Body):
    """A schema as OpenAI wraps it. An answer follows it always, whatever `strict` says; the rest are labels."""

    name: Annotated[str, Field(max_length=64)] = ""
    description: Annotated[str, Field(max_length=4096)] | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]

    @field_validator("schema_")
    @classmethod
    def _can_be_passed_on(cls, schema: dict[str, Any]) -> dict[str, Any]:
        level: list[Any] = [schema]
        for _ in range(MAX_SCHEMA_DEPTH):
            level = [child for parent in level for child in _children(parent)]
            if any(isinstance(child, int) and not -(2**63) <= child < 2**63 for child in level):
                raise ValueError("expected integers of 64 bits")
        if level:
            raise ValueError(f"expected at most {MAX_SCHEMA_DEPTH} levels of objects and lists")
        return schema


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class Sampling(Body):
    """What both generation endpoints take. Bounds are those of text/params.py, which has the words for each."""

    model: NonEmpty
    lora: (
        Annotated[list[LoraTerm], Field(max_length=256)]
        | Annotated[dict[NonEmpty, Finite], Field(max_length=256)]
        | None
    ) = None
    """The mixture, where `model` is the base."""

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    """Whom the client answers; stands in the log."""

    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = 1
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1000)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[BiasKey, Bias], Field(max_length=1024)] | None = None
    response_format: ResponseFormat | None = None

    top_k: Annotated[int, Field(ge=-1, le=MAX_INTEGER)] | None = None
    """0, and -1 as vLLM has it, keep all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None

    deadline: Seconds | None = None
    """Seconds until the first token; the policy `slo` refuses at once what cannot make it."""
    timeout: Seconds | None = None
    """Seconds from the request's arrival to its end; then it is cancelled and answered with 408."""

    @field_validator("stream_options")
    @classmethod
    def _needs_a_stream(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise ValueError("it goes with `stream`: true")
        return options

    @property
    def lora_terms(self) -> Iterable[tuple[str, float]] | None:
        """`lora` as pairs, whichever form it came in."""
        if isinstance(self.lora, list):
            return [(term.name, term.weight) for term in self.lora]
        return None if self.lora is None else self.lora.items()

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(self) -> dict[str, Any]:
        """The fields of text.params.SamplingParams that were given, by name."""
        given = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        if self.top_k == -1:
            del given["top_k"]
        if self.logit_bias is not None:
            given["logit_bias"] = {int(token_id): bias for token_id, bias in self.logit_bias.items()}
        if isinstance(self.response_format, JsonObjectFormat):
            given["response_format"] = {"type": "json_object"}
        elif isinstance(self.response_format, JsonSchemaFormat):
            schema = self.response_format.json_schema.schema_
            given["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
        return given


_SAMPLING = (
    "n stop seed temperature top_p presence_penalty frequency_penalty top_k min_p repetition_penalty min_tokens "
    "stop_token_ids ignore_eos skip_special_tokens include_stop_str_in_output"
).split()
"""Fields that go to the engine as they came."""


class CompletionBody(Sampling, UnsupportedOfCompletions):
    """POST /v1/completions"""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_SAMPLES)]
        | TokenIds
        | Annotated[list[TokenIds], Field(max_length=MAX_SAMPLES, min_length=1)]
    )
    max_tokens: Count | None = 16
    """As OpenAI has it. null: until the model stops or its context is full."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @field_validator("prompt")
    @classmethod
    def _has_room_for_all_samples(cls, prompt: Any, info: ValidationInfo) -> Any:
        num_prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
        n = info.data.get("n") or 1
        if num_prompts * n > MAX_SAMPLES_OF_ALL:
            raise ValueError(
                f"{num_prompts} prompts with `n`: {n} are {num_prompts * n:,} samples; one request may ask for "
                f"{MAX_SAMPLES_OF_ALL:,}"
            )
        return prompt

    def sampling_params(self) -> dict[str, Any]:
        given = {"max_tokens": self.max_tokens, "logprobs": self.logprobs}
        return super().sampling_params() | {
            name: value for name, value in given.items() if value is not None
        }


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(UnsupportedOfMessages):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]

    def rendered(self) -> dict[str, str]:
        """What chat templates take: "developer" is OpenAI's newer word for "system", and parts become lines."""
        text = (
            self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        )
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[Message], Field(min_length=1, max_length=1024)]


class Rendering(Body):
    """How a chat template writes messages."""

    messages: Messages
    add_generation_prompt: bool = True
    """End with the words that begin an answer."""
    continue_final_message: bool = False
    """Leave the last message open, to be continued; then `add_generation_prompt` must be false."""

    @field_validator("continue_final_message")
    @classmethod
    def _has_one_end(cls, continues: bool, info: ValidationInfo) -> bool:
        if continues and info.data.get("add_generation_prompt"):
            raise ValueError("it needs `add_generation_prompt`: false")
        return continues


class ChatBody(Rendering, Sampling, UnsupportedOfChat):
    """POST /v1/chat/completions"""

    max_completion_tokens: Count | None = None
    """None: until the model stops or its context is full."""
    max_tokens: Count | None = None
    """The older name of max_completion_tokens."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @field_validator("max_tokens")
    @classmethod
    def _is_the_same(cls, older: int | None, info: ValidationInfo) -> int | None:
        newer = info.data.get("max_completion_tokens")
        if None not in (older, newer) and older != newer:
            raise ValueError(f"it means the same as `max_completion_tokens`, which is {newer}; give one")
        return older

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, top: int | None, info: ValidationInfo) -> int | None:
        if top and not info.data.get("logprobs"):
            raise ValueError("it goes with `logprobs`: true")
        return top

    def sampling_params(self) -> dict[str, Any]:
        given = super().sampling_params()
        if (max_tokens := self.max_completion_tokens or self.max_tokens) is not None:
            given["max_tokens"] = max_tokens
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return given


class TokenizeText(Body):
    """POST /tokenize of a text"""

    model: NonEmpty | None = None
    prompt: Text
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(Rendering):
    """POST /tokenize of a chat"""

    model: NonEmpty | None = None
    return_token_strs: bool = False


def _text_or_chat(body: Any) -> str:
    return "chat" if isinstance(body, dict) and "messages" in body else "text"


TokenizeBody = Annotated[
    Annotated[TokenizeText, Tag("text")] | Annotated[TokenizeChat, Tag("chat")],
    Discriminator(_text_or_chat),
]


class DetokenizeBody(Body):
    """POST /detokenize"""

    model: NonEmpty | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class AdapterName(Body):
    """POST /v1/unload_lora_adapter, /v1/pin_lora_adapter, /v1/unpin_lora_adapter"""

    lora_name: NonEmpty


class LoadAdapterBody(AdapterName):
    """POST /v1/load_lora_adapter"""

    lora_path: NonEmpty | None = None
    """Below an adapter root, without the root; None: the same as the name."""

    @field_validator("lora_path")
    @classmethod
    def _is_below_a_root(cls, path: str | None) -> str | None:
        if path is not None and (path.startswith(("/", "~", "\\")) or ".." in re.split(r"[/\\]", path)):
            raise ValueError("expected a path below an adapter root, neither absolute nor with '..'")
        return path
