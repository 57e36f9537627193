"""What both sides of a federation agree on. Knows no Flower and no SQL."""

import os

# What libraries read from the environment when they are imported, so it is set before any of them can be.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
# gRPC prints every stranger's failed handshake to stderr; our own log says what matters.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# torch's threads sleep while they wait for one another. Spinning, they take the cores from whatever else runs here:
# nine times the wall time for features, measured on two busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
