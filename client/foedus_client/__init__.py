"""What a site runs beside its data."""

import foedus_common  # noqa: F401 -- sets the environment before flwr and grpc are imported
