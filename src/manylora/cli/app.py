"""The commands of `manylora`, gathered."""

import typer

from manylora.cli import adapters, complete, demo, distill, generate, inspect, measure, train

app = typer.Typer(
    name="manylora",
    help="Make, mix and serve LoRA adapters: thousands of them, and weighted mixtures of them, on one base model.\n\n"
    "A mixture is written name:weight+name:weight; a name alone has weight 1.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

demo.register(app)
complete.register(app)
generate.register(app)
distill.register(app)
adapters.register(app)
inspect.register(app)
train.register(app)
measure.register(app)
