"""The command line. Each command is a thin reading of options; what it does lives in the package below."""

import sys


def main() -> None:
    """Run `manylora`. An error raised on purpose is printed as one message, without a traceback; exit status 1."""
    # Here, not above: importing the package must stay light.
    from rich.console import Console
    from rich.markup import escape

    from manylora.cli.app import app
    from manylora.errors import ManyLoraError

    try:
        app()
    except ManyLoraError as error:
        message = f"[bold red]{type(error).__name__}:[/] {escape(str(error))}"
        Console(stderr=True, highlight=False).print(message, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
