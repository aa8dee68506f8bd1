"""Speed, measured against what users would pick instead: `python -m benchmarks --help`."""
