"""Signers: whose key may sign what, from when until when, and whether it was revoked."""

import datetime
from collections.abc import Mapping
from typing import Any, NamedTuple

from flexolmo_jax.federation.names import check_name
from flexolmo_jax.trust.keys import check_public, key_id

ROLES = {
    "publisher": "anchors",
    "owner": "expert packages of the names that the registry gives it",
    "coordinator": "merged models, and the log",
}
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_FIELDS = ("name", "key", "role", "experts", "from", "until", "revoked")


class Revoked(NamedTuple):
    """When a key was revoked, and why."""

    time: datetime.datetime
    reason: str


class Signer(NamedTuple):
    """An entry of a registry.

    Attributes:
      name: of who signs, unique in the registry.
      key: the public key, as PEM (`trust.keys`), unique in the registry.
      role: one of `ROLES`.
      experts: names of the experts that an owner may sign; empty for the other roles.
      start: its signatures are accepted from this time on,
      until: and before this one.
      revoked: None unless it was revoked; then no signature of it is accepted, whenever it was
        made, since a signature does not prove its time.
    """

    name: str
    key: str
    role: str
    experts: tuple[str, ...]
    start: datetime.datetime
    until: datetime.datetime
    revoked: Revoked | None = None

    @property
    def key_id(self) -> str:
        return key_id(self.key)

    def to_json(self) -> dict[str, Any]:
        """The entry as a registry holds it."""
        revoked = self.revoked and {
            "time": time_text(self.revoked.time),
            "reason": self.revoked.reason,
        }
        return {
            "name": self.name, "key": self.key, "role": self.role, "experts": list(self.experts),
            "from": time_text(self.start), "until": time_text(self.until), "revoked": revoked,
        }  # fmt: skip

    def check(self, role: str, expert: str | None, now: datetime.datetime) -> None:
        """Raises ValueError, with the reason, unless its signature is accepted.

        Args:
          role: what signs the thing at hand, one of `ROLES`.
          expert: the name of the expert, for an owner.
          now: the time.
        """
        who = f"{self.name}'s key {self.key_id[:12]}"
        if self.revoked is not None:
            raise ValueError(
                f"{who} was revoked on {time_text(self.revoked.time)}: {self.revoked.reason}"
            )
        if now < self.start:
            raise ValueError(f"{who} is not valid before {time_text(self.start)}")
        if now >= self.until:
            raise ValueError(f"{who} is not valid since {time_text(self.until)}")
        if self.role != role:
            raise ValueError(f"{who} is that of {_a(self.role)}, expected that of {_a(role)}")
        if role == "owner" and expert not in self.experts:
            raise ValueError(
                f"{who} may sign the experts {', '.join(self.experts)}, and this is {expert!r}"
            )


def read_signer(value: Any, where: str) -> Signer:
    """A signer from JSON.

    Raises:
      ValueError: a field is missing, unknown or impossible.
    """
    if not isinstance(value, Mapping) or set(value) != set(_FIELDS):
        raise ValueError(f"{where}: expected a signer, an object of {', '.join(_FIELDS)}")
    revoked = value["revoked"]
    if revoked is not None:
        if not isinstance(revoked, Mapping) or set(revoked) != {"time", "reason"}:
            raise ValueError(f"{where}: expected revoked to be null, or a time and a reason")
        revoked = Revoked(read_time(revoked["time"], where), _text(revoked["reason"], where))
    experts = value["experts"]
    if not isinstance(experts, list):
        raise ValueError(f"{where}: expected experts to be a list of names")
    return make_signer(
        _text(value["name"], where), check_public(value["key"], where), value["role"],
        tuple(experts), read_time(value["from"], where), read_time(value["until"], where),
        revoked, where=where,
    )  # fmt: skip


def make_signer(
    name: str,
    key: str,
    role: str,
    experts: tuple[str, ...],
    start: datetime.datetime,
    until: datetime.datetime,
    revoked: Revoked | None = None,
    *,
    where: str,
) -> Signer:
    """A signer whose fields fit together.

    Raises:
      ValueError: they do not; `where` says where they stand.
    """
    if role not in ROLES:
        raise ValueError(f"{where}: expected a role, {', '.join(ROLES)}; found {role!r:.100}")
    if (role == "owner") != bool(experts):
        raise ValueError(f"{where}: an owner has names of experts, the other roles have none")
    for expert in experts:
        try:
            check_name(expert)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
    if len(set(experts)) < len(experts):
        raise ValueError(f"{where}: an expert is named twice")
    if not start < until:
        raise ValueError(
            f"{where}: expected a time of beginning before that of the end, found "
            f"{time_text(start)} and {time_text(until)}"
        )
    return Signer(name, key, role, experts, start, until, revoked)


def role_for(kind: str) -> str:
    """The role that signs a package of a kind: "anchor", "expert" or "merged"."""
    return {"anchor": "publisher", "expert": "owner", "merged": "coordinator"}[kind]


def utc_now() -> datetime.datetime:
    """Now, in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def time_text(time: datetime.datetime) -> str:
    """A time as registries spell it: 2026-11-29T08:00:00Z."""
    return time.strftime(_TIME)


def read_time(text: Any, where: str) -> datetime.datetime:
    """A time that `time_text` spelled.

    Raises:
      ValueError: it is spelled in another way; `where` says where it stands.
    """
    try:
        time = datetime.datetime.strptime(text, _TIME).replace(tzinfo=datetime.UTC)
        if time_text(time) == text:
            return time
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{where}: expected a time such as 2026-11-29T08:00:00Z, found {text!r:.100}")


def _a(role: str) -> str:
    return f"an {role}" if role == "owner" else f"a {role}"


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError(f"{where}: expected a line of text, found {value!r:.100}")
    return value
