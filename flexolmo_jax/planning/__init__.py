"""Will a training step fit, and how fast can it be: compiled for chips that are not at hand."""
