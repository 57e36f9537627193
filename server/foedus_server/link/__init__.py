"""The coordinator's end of the link to the sites: Flower's Grid over our gRPC service."""
