"""What the operator of the consortium runs. torch lives in child processes only."""

import foedus_common  # noqa: F401 -- sets the environment before flwr and grpc are imported
