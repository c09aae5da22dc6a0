"""A command's options from the fields of a settings dataclass: name, type, default, and its docstring as help."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

Command = Callable[..., None]


def options_of(config: type) -> list[inspect.Parameter]:
    """Return one keyword parameter for each field of a dataclass, as typer reads them.

    A field `max_tokens: int | None = None` becomes `--max-tokens INTEGER`; a tuple is given with commas between.
    """
    hints, docs = get_type_hints(config), field_docs(config)
    return [_parameter(field, hints[field.name], docs[field.name]) for field in fields(config)]


def value_of(config: type, values: dict[str, Any]) -> dict[str, Any]:
    """Take out of `values` what belongs to `config`, with "a,b" from the command line as the tuple that a field is."""
    hints = get_type_hints(config)
    return {
        field.name: _converted(hints[field.name], values[field.name])
        for field in fields(config)
        if field.name in values
    }


def command(app: typer.Typer, name: str, *configs: type) -> Callable[[Command], Command]:
    """Decorate a function that takes own options and `**values`: each field of the configs becomes an option too,
    but for those that are parameters of the function.

    The function gets what was given for the fields in `values`, ready for `value_of`.
    """

    def register(function: Command) -> Command:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        named = {parameter.name for parameter in own}
        extra = [o for config in configs for o in options_of(config) if o.name not in named]

        def call(**values: Any) -> None:
            function(**values)

        call.__signature__ = inspect.Signature([*own, *extra])  # type: ignore[attr-defined]
        call.__doc__ = function.__doc__
        app.command(name)(call)
        return function

    return register


@cache
def field_docs(config: type) -> dict[str, str]:
    """Return the docstring under each field, as one paragraph."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, after in zip(body.body, [*body.body[1:], ast.Pass()], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            doc = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                doc = inspect.cleandoc(str(after.value.value)).replace("\n", " ")
            docs[statement.target.id] = doc
    return docs


def _parameter(field: "Field[Any]", hint: Any, doc: str) -> inspect.Parameter:
    default = field.default
    if default is MISSING:
        default = ... if field.default_factory is MISSING else field.default_factory()
    flag = f"--{field.name.replace('_', '-')}"
    names = f"{flag}/--no-{flag[2:]}" if _without_none(hint) is bool else flag
    option = typer.Option(names, help=doc)
    if get_origin(hint) is tuple:
        shown = ",".join(map(str, default)) if default is not ... else ...
        return _keyword(field.name, Annotated[str, option], shown)
    return _keyword(field.name, Annotated[hint, option], default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kept = inspect.Parameter.empty if default is ... else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=kept)


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        (kept,) = [part for part in get_args(hint) if part is not NoneType] or [hint]
        return kept
    return hint


def _converted(hint: Any, value: Any) -> Any:
    if get_origin(hint) is not tuple or not isinstance(value, str):
        return value
    kind = get_args(hint)[0]
    try:
        return tuple(kind(part.strip()) for part in value.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"expected {kind.__name__}s with commas between, got {value!r}") from None
