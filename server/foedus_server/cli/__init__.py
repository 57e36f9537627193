"""What the consortium's operator types, `foedus`."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """`foedus`. What it needs takes half a second to import, and Ctrl-C ends that as quietly as anything later."""
    try:
        from foedus_server.cli.operator import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()
