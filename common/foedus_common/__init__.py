"""What both sides of a federation agree on. Knows no Flower and no SQL."""
