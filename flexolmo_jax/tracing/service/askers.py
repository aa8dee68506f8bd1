"""Who may ask an owner's index."""

import dataclasses

from flexolmo_jax.web.keys import KeyFiles


@dataclasses.dataclass(frozen=True)
class Asker:
    """Somebody who may ask.

    Attributes:
      name: the log and the budgets are kept under it.
      sha256: of its key; empty where anybody may ask.
    """

    name: str
    sha256: str = ""

    def __post_init__(self):
        if not isinstance(self.name, str) or not isinstance(self.sha256, str) or not self.name:
            raise ValueError(f"expected the name of an asker, found {self.name!r}")


ANYBODY = Asker("anybody")
KEYS = KeyFiles(Asker, "flexolmo trace keys add")
