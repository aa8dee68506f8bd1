"""What an API key permits: which experts, and how much of them."""

import dataclasses
from typing import Literal

from flexolmo_jax.web.keys import KeyFiles

Mass = Literal["token", "request", "none"]


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a key permits.

    Attributes:
      name: whose key it is; requests are logged under it.
      sha256: of the key; empty for the policy of a server without keys.
      experts: that it may use; None: all, also those that come later.
      always_on: of these, what no request may switch off.
      tokens_per_minute: of prompts and answers together; None: any number.
      concurrency: how many requests at a time; None: any number.
      expert_mass: what answers say of the experts' shares: of each token, of the whole request, or
        nothing.
    """

    name: str
    sha256: str = ""
    experts: tuple[str, ...] | None = None
    always_on: tuple[str, ...] = ()
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    expert_mass: Mass = "token"

    def __post_init__(self):
        for field in ("experts", "always_on"):
            value = getattr(self, field)
            if value is not None and not (
                isinstance(value, tuple) and all(isinstance(name, str) for name in value)
            ):
                raise ValueError(f"key {self.name!r}: {field} must be names, found {value!r}")
        stray = set() if self.experts is None else set(self.always_on) - set(self.experts)
        if stray:
            raise ValueError(
                f"key {self.name!r}: {', '.join(sorted(stray))} must stay on, but is not among "
                f"its experts: {', '.join(self.experts or ())}"
            )
        for field in ("tokens_per_minute", "concurrency"):
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"key {self.name!r}: {field} must be at least 1, found {value!r}")
        if self.expert_mass not in ("token", "request", "none"):
            raise ValueError(
                f"key {self.name!r}: expert_mass must be token, request or none, found "
                f"{self.expert_mass!r}"
            )


OPEN = Policy("anybody")
KEYS = KeyFiles(Policy, "flexolmo keys add")
