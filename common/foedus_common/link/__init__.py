"""The gRPC service between coordinator and sites: its definition, its stubs and what both ends agree on."""
