"""Many sites on one machine, through the same round code as production."""
