"""The single studies that `flexolmo study NAME` runs, each in a module of its own.

A module has `add_arguments(parser)` and `run(args)`; its docstring is the command's help.
"""

STUDIES: dict[str, str] = {}  # name -> module
