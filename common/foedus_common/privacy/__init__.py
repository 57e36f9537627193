"""Differential privacy: the noise that is added and the account of what it buys."""
