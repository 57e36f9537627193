"""The process that trains, and the pipe to it."""
