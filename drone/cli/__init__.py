"""The command `drone`: compress a model in a folder, from a terminal."""

import sys


def main() -> None:
    """Run the command; without typer, say how to get it."""
    try:
        import typer  # noqa: F401  # the one package that only the command needs
    except ModuleNotFoundError:
        print(
            "The command needs typer, which the extra `cli` brings; "
            "`import drone` works without.",
            file=sys.stderr,
        )
        sys.exit(2)
    from drone.cli.app import app

    app()
