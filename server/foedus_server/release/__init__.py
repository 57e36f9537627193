"""What becomes of a finished run: the adapter folder and its evaluation."""
