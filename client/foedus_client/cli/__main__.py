"""`python -m foedus_client.cli` is `foedus-site`, where the command itself is not on the path."""

from foedus_client.cli import main

main()
