"""What a process needs around the work: start-up, other processes, and the screen."""
