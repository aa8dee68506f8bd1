"""A usage ledger: an append-only log of requests, whose checkpoints the coordinator signs.

The log is a hash chain (storage/hash_chain.py), so one digest, its *head*, stands for all lines.
Beside it each owner has a chain of its own, over what it may see of its own lines. A checkpoint is
a line that holds, for every owner, the head of that chain and its running totals, each signed
together with the head of the whole log. An owner therefore needs one signature and its own lines
to see that none was dropped or altered (excerpts.py).

Not every line is signed: a signature for each owner and request would outweigh the lines, and say
no more than the next checkpoint does.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flexolmo_jax.storage import hash_chain
from flexolmo_jax.storage.locks import locked
from flexolmo_jax.usage import entries
from flexolmo_jax.usage.entries import CHECKPOINT, LEDGER, State
from flexolmo_jax.usage.signing import canonical, is_signed, public_of, sign

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FORMAT = 1
NOTHING = State(0, 0, 0, 0.0, hash_chain.START)


class Checkpoint(NamedTuple):
    """A checkpoint: what it signs for whom.

    Attributes:
      lines, head: of the ledger before it; the head is the digest of the last of these lines.
      time: when it was made (UTC).
      states, signatures: by owner.
    """

    lines: int
    head: str
    time: str
    states: dict[str, State]
    signatures: dict[str, str]

    def statement(self, ledger: str, owner: str) -> dict[str, Any]:
        """What the coordinator signs for an owner."""
        return {
            "what": f"flexolmo usage {FORMAT}",
            "ledger": ledger,
            "ledger_lines": self.lines,
            "ledger_head": self.head,
            "time": self.time,
            "owner": owner,
            **self.states[owner]._asdict(),
        }


@dataclasses.dataclass
class Contents:
    """What a ledger says, as far as it was read.

    Attributes:
      ledger, key: its random name, and the public key of its signatures.
      lines, head: all lines, and the digest of the last.
      states: of every owner that has a line.
      signed: the last checkpoint; None: there is none yet.
    """

    ledger: str
    key: str
    lines: int
    head: str
    states: dict[str, State] = dataclasses.field(default_factory=dict)
    signed: Checkpoint | None = None

    @property
    def unsigned(self) -> int:
        """How many lines came after the last checkpoint."""
        return self.lines - (1 if self.signed is None else self.signed.lines + 1)

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds a use or sample, whose `time` is known, to its owners' states."""
        for owner in record["mass"]:
            line = entries.seen_by(owner, record)
            assert line is not None
            self.states[owner] = next_state(self.states.get(owner, NOTHING), line)


def next_state(state: State, line: Mapping[str, Any]) -> State:
    """An owner's state after one more of its lines, as the owner sees that."""
    head = hashlib.sha256(state.head.encode() + canonical(line)).hexdigest()
    counts = state._replace(lines=state.lines + 1, head=head)
    if line["kind"] != entries.USE:
        return counts
    return counts._replace(
        requests=state.requests + 1,
        tokens=state.tokens + line["tokens"],
        mass=round(state.mass + line["mass"], 4),
    )


def replay(
    file: Path,
    seen: Callable[[dict[str, Any]], None] | None = None,
    adds_up: bool = True,
) -> Contents:
    """Reads a ledger, and checks everything but signatures (`check_signatures`).

    Args:
      file: the ledger.
      seen: called with every use and sample; they have `number` and `time` too.
      adds_up: check that, and do not take the totals of checkpoints for granted: five times as
        slow. Whoever holds the key that signed them has no need to.

    Raises:
      ValueError: a line was changed, dropped or moved, is damaged, or is none of a ledger; a
        checkpoint does not say what the lines before it add up to.
      OSError: it cannot be read.
    """
    contents: Contents | None = None
    record: dict[str, Any] = {}
    later: list[dict[str, Any]] = []  # lines after the last checkpoint, if that is believed
    for record in hash_chain.read(file):
        where = f"{file}, line {record['number']}"
        if contents is None:
            contents = _begun(record, file)
        elif record.get("kind") == CHECKPOINT:
            known = contents.states.keys() | {owner for line in later for owner in line["mass"]}
            contents.signed = _checkpoint(record, contents, where, adds_up)
            if contents.signed.states.keys() != known:
                raise ValueError(f"{where}: a checkpoint of other owners than the lines before it")
            contents.states = dict(contents.signed.states)
            later.clear()
        else:
            entries.check(record, where)
            if adds_up:
                contents.add(record)
            else:
                later.append(record)
            if seen is not None:
                seen(record)
        contents.lines, contents.head = record["number"], record["digest"]
    if contents is None:
        raise ValueError(f"{file}: expected a usage ledger, found an empty file")
    for line in later:
        contents.add(line)
    # No line after it vouches for the last one's spelling.
    if hash_chain.digest_of(record) != record["digest"]:
        raise ValueError(f"{file}, line {contents.lines}: not as this program writes it")
    return contents


def check_signatures(contents: Contents, file: Path) -> Checkpoint:
    """The last checkpoint, once its signatures are checked; it vouches for all lines before it.

    Raises:
      ValueError: there is none, or a signature is not one of the ledger's key.
    """
    signed = contents.signed
    if signed is None:
        raise ValueError(f"{file}: nothing in it is signed yet; the server signs once a minute")
    for owner, signature in signed.signatures.items():
        if not is_signed(contents.key, signed.statement(contents.ledger, owner), signature):
            raise ValueError(f"{file}, line {signed.lines + 1}: a signature is wrong ({owner})")
    return signed


def _begun(record: Mapping[str, Any], file: Path) -> Contents:
    names = set(record) - {"number", "time", "before", "digest"}
    is_ledger = names == {"kind", "format", "ledger", "key"} and record["kind"] == LEDGER
    if not is_ledger:
        raise ValueError(f"{file}: expected a usage ledger (`flexolmo serve --usage`)")
    if record["format"] != FORMAT:
        raise ValueError(f"{file}: expected format {FORMAT}, found {record['format']!r}")
    return Contents(str(record["ledger"]), str(record["key"]), 1, record["digest"])


def _checkpoint(
    record: Mapping[str, Any], contents: Contents, where: str, adds_up: bool
) -> Checkpoint:
    try:
        given = {owner: dict(state) for owner, state in record["owners"].items()}
        signatures = {owner: state.pop("signature") for owner, state in given.items()}
        states = {owner: State(**state) for owner, state in given.items()}
        is_sound = set(record) == {"number", "time", "before", "digest", "kind", "owners"}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}: expected a checkpoint ({error!r})") from error
    if not is_sound or (adds_up and states != contents.states):
        raise ValueError(f"{where}: a checkpoint with other totals than the lines before it")
    return Checkpoint(contents.lines, contents.head, record["time"], states, signatures)


class Ledger:
    """A ledger that this process writes; no other one can at the same time.

    Args:
      file: the ledger; made if it is missing. What a crash left of its last line is cut off, and
        lines that no checkpoint had signed are signed now.
      key: signs.

    Raises:
      ValueError: another process writes it, it is damaged, or signed with another key.
      OSError: it cannot be written.
    """

    def __init__(self, file: Path, key: "Ed25519PrivateKey"):
        self._file, self._key = file, key
        self._held = contextlib.ExitStack()
        lock = file.with_name(f".{file.name}.writer.lock")
        self._held.enter_context(locked(lock, f"is writing {file.name}", "give each its own"))
        try:
            hash_chain.mend(file)
            if not file.exists() or not file.stat().st_size:
                first = {"kind": LEDGER, "format": FORMAT, "ledger": secrets.token_hex(16)}
                hash_chain.append(file, [{**first, "key": public_of(key)}])
            self.contents = replay(file, adds_up=False)
            if self.contents.key != public_of(key):
                raise ValueError(
                    f"{file}: signed with another key ({self.contents.key[:16]}...); give that "
                    "one, or begin a new ledger"
                )
            if self.contents.signed is not None:
                check_signatures(self.contents, file)
            self.checkpoint()
        except BaseException:
            self.close()
            raise

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends uses and samples (entries.py), and waits until they are on the disk.

        Raises:
          ValueError: a record is none of these; nothing was written.
          OSError: the disk is full, or cannot be written; nothing was.
        """
        for record in records:
            entries.check(record, str(self._file))
        time = entries.hour()
        self.contents.head = hash_chain.append(self._file, map(dict, records), time)
        self.contents.lines += len(records)
        for record in records:
            self.contents.add({**record, "time": time})

    def checkpoint(self) -> None:
        """Signs all lines, unless that is done. Raises OSError as `append`."""
        contents = self.contents
        if not contents.unsigned:
            return
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        made = Checkpoint(contents.lines, contents.head, time, dict(contents.states), {})
        for owner in made.states:
            made.signatures[owner] = sign(self._key, made.statement(contents.ledger, owner))
        owners = {
            owner: {**state._asdict(), "signature": made.signatures[owner]}
            for owner, state in made.states.items()
        }
        record = {"kind": CHECKPOINT, "owners": owners}
        contents.head = hash_chain.append(self._file, [record], time)
        contents.lines += 1
        contents.signed = made

    def close(self) -> None:
        """Lets other processes write it."""
        self._held.close()
