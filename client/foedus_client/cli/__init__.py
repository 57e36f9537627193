"""What a site's administrator types, `foedus-site`; knows the daemon only through the home's database."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """`foedus-site`. What it needs takes half a second to import, and Ctrl-C ends that as quietly as anything later."""
    try:
        from foedus_client.cli.site import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()
