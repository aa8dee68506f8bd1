"""`python -m flexolmo_jax` is the command `flexolmo`."""

import sys

from flexolmo_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
