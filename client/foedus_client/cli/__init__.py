"""What a site's administrator types, `foedus-site`; knows the daemon only through the home's database."""

from foedus_client.cli.site import main

__all__ = ["main"]
