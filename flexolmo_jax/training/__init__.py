"""From config and text to a package: the step, the loop, and the run folder."""
