"""Which group a row names: ids in one form, however a file spells them."""

import datetime
import decimal
import math
import re
import unicodedata

MISSING = ("", "na", "nan", "-nan", "none", "null", "<na>", "n/a", "#n/a", "nat")
_WHOLE = re.compile(r"[+-]?[0-9]+(\.0*)?")


def group_id(value: object) -> str | None:
    """The id in one form, so that one patient is not two units of privacy.

    17, 17.0, "17", "017" and "17.0" are the same id; so are "p1", "P1 " and "\\u200bp1". That two
    different groups become one costs quality, and no privacy.

    Args:
      value: of the group field.

    Returns:
      the id; None where the row names none: null, NaN, blank, or a word that exports write there.

    Raises:
      ValueError: it is of a type that names no group (a list, a dict, a truth value), or infinite.
    """
    if value is None:
        return None
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # of NumPy
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="strict")
    if isinstance(value, float | decimal.Decimal):
        if math.isnan(value):
            return None
        if math.isinf(value):
            raise ValueError("an infinite number names no group")
        value = str(int(value)) if value == int(value) else str(float(value))
    if isinstance(value, bool) or not isinstance(value, str | int | datetime.date):
        raise ValueError(f"expected a text or a number that names a group, found {value!r:.60}")
    text = unicodedata.normalize("NFKC", str(value)).casefold()
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    if text in MISSING:
        return None
    if _WHOLE.fullmatch(text):
        digits = text.partition(".")[0]
        sign = "-" if digits.startswith("-") else ""
        digits = digits.lstrip("+-").lstrip("0")
        return f"{sign}{digits}" if digits else "0"
    return text
