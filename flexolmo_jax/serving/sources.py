"""Which experts a request may use: by its model's name, by its own words, and by its key."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from flexolmo_jax.federation.names import PUBLIC
from flexolmo_jax.serving.keys import Policy
from flexolmo_jax.serving.protocol import Experts
from flexolmo_jax.web.errors import ApiError


@dataclasses.dataclass(frozen=True)
class Sources:
    """The experts of a served model.

    Attributes:
      model: the name that clients use.
      names: of all experts in memory, in the order of the stack.
      withdrawn: experts that were here once; some of them may still be in memory.
      profiles: names, and the experts that they stand for, beside `without-NAME` of each expert.
      revoked: experts that may not be used, and why (`serving/signed.py`).
      refused: why the whole model may not be used; None: it may.
    """

    model: str
    names: tuple[str, ...]
    withdrawn: frozenset[str] = frozenset()
    profiles: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    revoked: Mapping[str, str] = dataclasses.field(default_factory=dict)
    refused: str | None = None

    @property
    def served(self) -> tuple[str, ...]:
        if self.refused is not None:
            return ()
        return tuple(name for name in self.names if name not in self._off)

    @property
    def _off(self) -> frozenset[str]:
        return self.withdrawn | self.revoked.keys()

    def check(self) -> None:
        """Raises ApiError 503, with the reason, if the whole model may not be used."""
        if self.refused is not None:
            raise ApiError(
                503, f"this model may not be used now: {self.refused}", code="model_refused"
            )

    def missing(self, policy: Policy) -> str | None:
        """Why a key has no answers: an expert that it may not switch off is off; None: none is."""
        for name in policy.always_on:
            if name not in self.served:
                why = self._why_off(name) if name in self._off else "is not in this model"
                return f"this key has answers with {name!r} only, which {why}"
        return None

    def _why_off(self, name: str) -> str:
        return f"was revoked: {self.revoked[name]}" if name in self.revoked else "was withdrawn"

    def permitted(self, policy: Policy) -> tuple[str, ...]:
        """The experts that a key may use."""
        if policy.experts is None:
            return self.served
        return tuple(name for name in self.served if name in policy.experts)

    def models(self, policy: Policy) -> dict[str, tuple[str, ...]]:
        """The model's names that a key may use, and their experts; the whole model first."""
        if self.missing(policy) is not None:
            return {}
        own = self.permitted(policy)
        found = {self.model: own}
        for name in own:
            rest = tuple(other for other in own if other != name)
            if rest and name != PUBLIC and name not in policy.always_on:
                found[f"{self.model}:without-{name}"] = rest
        for profile, names in self.profiles.items():
            chosen = tuple(name for name in own if name in names)
            if set(names) & set(self.served) == set(chosen) >= set(policy.always_on) & set(own):
                if chosen:
                    found[f"{self.model}:{profile}"] = chosen
        return found

    def mask(self, model: str, experts: Experts | None, policy: Policy) -> np.ndarray:
        """The experts of a request: bool [E].

        Raises:
          ApiError: 404 an unknown model; 400 an unknown expert, or none is left; 403 an expert that
            the key may not use, or may not switch off; 410 a withdrawn or revoked one; 503 the
            model may not be used, or an expert is off that the key may not switch off.
        """
        self.check()
        missing = self.missing(policy)
        if missing is not None:
            raise ApiError(503, missing, "model", "expert_always_on")
        own = self.models(policy).get(model)
        if own is None:
            own = self._of_refused(model, policy)
        if experts is not None:
            chosen = experts.only if experts.only is not None else experts.without
            param = "experts.only" if experts.only is not None else "experts.without"
            assert chosen is not None
            for name in chosen:
                self._check(name, policy, param)
            is_on = experts.only is not None
            own = tuple(name for name in own if (name in chosen) == is_on)
            for name in set(policy.always_on) & set(self.permitted(policy)) - set(own):
                raise ApiError(
                    403, f"this key may not switch off {name!r}", param, "expert_always_on"
                )
        if not self.permitted(policy):
            raise ApiError(403, "this key may use no expert of the model", "model", "not_permitted")
        if not own:
            raise ApiError(400, "no expert is left to answer; leave at least one on", "experts")
        return np.isin(self.names, own)

    def _of_refused(self, model: str, policy: Policy) -> tuple[str, ...]:
        """Raises the error of a model's name that a key may not use."""
        base, _, profile = model.partition(":")
        if base == self.model and profile.startswith("without-"):
            name = profile.removeprefix("without-")
            if name in self._off and _may_use(policy, name):  # it is off anyway
                return self.permitted(policy)
            if name in policy.always_on:
                raise ApiError(
                    403, f"this key may not switch off {name!r}", "model", "expert_always_on"
                )
        if base == self.model and profile in self.profiles:
            gone = [x for x in self.profiles[profile] if x in self._off and _may_use(policy, x)]
            if gone and not set(self.profiles[profile]) & set(self.served):
                raise self._gone(gone[0], "model")
            raise ApiError(403, f"this key may not use {model!r}", "model", "not_permitted")
        known = ", ".join(self.models(policy))
        raise ApiError(
            404, f"no model named {model!r}; there are {known}", "model", "model_not_found"
        )

    def _check(self, name: str, policy: Policy, param: str) -> None:
        if name not in self.names and name not in self._off:
            known = ", ".join(self.permitted(policy))
            raise ApiError(
                400, f"no expert named {name!r}; there are {known}", param, "unknown_expert"
            )
        if not _may_use(policy, name):
            raise ApiError(403, f"this key may not use the expert {name!r}", param, "not_permitted")
        if name in self._off:
            raise self._gone(name, param)

    def _gone(self, name: str, param: str) -> ApiError:
        code = "expert_revoked" if name in self.revoked else "expert_withdrawn"
        return ApiError(410, f"the expert {name!r} {self._why_off(name)}", param, code)


def _may_use(policy: Policy, name: str) -> bool:
    return policy.experts is None or name in policy.experts
