"""One seed from several numbers, such that neighbouring numbers share nothing.

Sums of seeds and counters do: epoch 1 of seed 0 would be epoch 0 of seed 1.
"""

import hashlib


def derived_seed(*numbers: int) -> int:
    """A number in [0, 2**32) that is a function of all the numbers and of their order."""
    digest = hashlib.sha256(":".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:4], "big")
