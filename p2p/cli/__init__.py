"""The command line."""
from p2p.cli.parser import main

__all__ = ["main"]
