"""`python -m foedus_server.cli` is `foedus`, where the command itself is not on the path."""

from foedus_server.cli import main

main()
