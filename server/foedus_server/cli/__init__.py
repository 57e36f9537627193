"""What the consortium's operator types, `foedus`."""

from foedus_server.cli.operator import main

__all__ = ["main"]
