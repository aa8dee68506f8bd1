"""Names of experts: which are valid, and which two may be in one model.

A name is what a user types after `--without`. The rule is plain ASCII: no other script can then
imitate a letter, and NFKC normalisation changes nothing. Names are compared by `look`, which is
the same for names that differ in case or in characters that many fonts draw alike.
"""

import re
from collections.abc import Sequence
from typing import Any

PUBLIC = "public"  # the anchor's own expert
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LOOK_ALIKES = str.maketrans("01i", "oll")


def look(name: str) -> str:
    """The look of a name: case-folded, with 0 as o, 1 and i as l, rn as m, vv as w."""
    return name.casefold().translate(_LOOK_ALIKES).replace("rn", "m").replace("vv", "w")


def check_name(name: Any) -> str:
    """The name, if it is valid for an expert.

    Raises:
      ValueError: it is not text, has other characters, or looks like the public expert's.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or look(name) == look(PUBLIC):
        raise ValueError(
            f"{name!r} cannot be an expert's name: expected up to 64 letters, digits, '.', '_' or "
            "'-', starting with a letter or digit, and not 'public' or what looks like it"
        )
    return name


def check_distinct(names: Sequence[str]) -> None:
    """Raises ValueError if two experts of a model have the same name, or names that look alike."""
    seen: dict[str, str] = {}
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two packages are named {name!r}; names must differ, so that each can be "
                "switched off"
            )
        other = seen.setdefault(look(name), name)
        if other != name:
            raise ValueError(
                f"two packages are named {other!r} and {name!r}, which look alike; names must "
                "differ clearly, so that each can be switched off"
            )
