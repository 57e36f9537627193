"""Recipes of data, model and metric. The only folder of this package that imports torch."""
