"""The process around the work: start-up, other processes, and the terminal."""
