"""What the models of all bodies share: the base that refuses unknown fields, and types with bounds."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_INTEGER = 2**31 - 1
MAX_SAMPLES = 128
"""Most samples of one prompt, and most prompts of one request."""

MAX_SAMPLES_OF_ALL = 1024
"""Most samples of all prompts of one request: each keeps its own copy of its prompt from the moment it is queued."""

MAX_LOGPROBS = 20
"""Most alternatives of a token whose log-probabilities are told."""

MAX_NAME = 64
"""Characters of an unknown field's name that are compared with the known ones."""

MAX_SCHEMA_DEPTH = 64
"""Most objects and lists, one within the other, of a JSON schema."""

Text = Annotated[str, Field(max_length=4 << 20)]
NonEmpty = Annotated[str, Field(min_length=1, max_length=4096)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
BiasKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Count = Annotated[int, Field(ge=1, le=MAX_INTEGER)]


class Body(BaseModel):
    """Base of all: no unknown field, and no value that is converted from another type (a "5" is no 5)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _knows_every_field(cls, values: Any) -> Any:
        """Refuse an unknown field before pydantic does, which could not say what is near."""
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for name in values if isinstance(values, dict) else ():
            if name not in known:
                near = get_close_matches(str(name)[:MAX_NAME], known)
                hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
                raise PydanticCustomError(
                    "unknown_field", "unknown field{hint}", {"field": name, "hint": hint}
                )
        return values
