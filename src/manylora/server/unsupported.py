"""Fields of OpenAI's API that this server does not implement.

They take only the value that asks for nothing, so that a client may spell a default out; any other is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from manylora.server.body import Body


class Unsupported(Body):
    """Fields of both of OpenAI's generation endpoints that this server does not implement."""

    metadata: None = None
    prompt_cache_key: None = None
    safety_identifier: None = None
    service_tier: None = None
    store: Literal[False] | None = None


class UnsupportedOfCompletions(Unsupported):
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None


class UnsupportedOfChat(Unsupported):
    audio: None = None
    function_call: None = None
    functions: None = None
    modalities: list[Literal["text"]] | None = None
    moderation: None = None
    parallel_tool_calls: None = None
    prediction: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    reasoning_effort: None = None
    tool_choice: Literal["none"] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    verbosity: None = None
    web_search_options: None = None


class UnsupportedOfMessages(Body):
    """What an answer carries besides its text may come back with it, empty."""

    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    name: None = None
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


UNSUPPORTED = frozenset(UnsupportedOfCompletions.model_fields) | frozenset(UnsupportedOfChat.model_fields)
UNSUPPORTED_IN_MESSAGES = frozenset(UnsupportedOfMessages.model_fields)
