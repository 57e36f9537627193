"""What the operator of the consortium runs. torch lives in child processes only."""
