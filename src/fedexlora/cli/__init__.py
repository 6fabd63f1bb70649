"""The command line: one thin file a command."""

from fedexlora.cli.main import main

__all__ = ["main"]
