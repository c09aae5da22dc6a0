"""The commands of `manylora`, gathered. The module of a command is imported when the command is asked for."""

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

_HOME = {
    "demo": "demo",
    "complete": "complete",
    "serve": "serve",
    "generate": "generate",
    "distill": "distill",
    "compose": "adapters",
    "convert": "adapters",
    "inspect": "inspect",
    "train": "train",
    "bench": "measure",
}
"""Which module registers each command, in the order in which help lists them."""


class CommandGroup(TyperGroup):
    """Imports what is asked for alone, so that one command does not wait for the libraries of all the others.

    `serve` relies on it: its process must not import torch.
    """

    # Any: typer may bring a click of its own, under a private name.

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_HOME)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        # Of a name that is no command, the message says which are near: all of them are needed then.
        for name in [cmd_name] if cmd_name in _HOME else _HOME:
            if name not in self.commands:
                part = typer.Typer(rich_markup_mode="markdown")
                import_module(f"manylora.cli.{_HOME[name]}").register(part)
                self.commands.update(get_group(part).commands)
        return self.commands.get(cmd_name)


app = typer.Typer(
    name="manylora",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def manylora() -> None:
    """Make, mix and serve LoRA adapters: thousands of them, and weighted mixtures of them, on one base model.

    A mixture is written name:weight+name:weight; a name alone has weight 1.
    """
