"""Cuts long texts into pieces whose concatenated tokens are those of the whole text.

The `tokenizers` library needs about a hundred bytes of memory for each byte that it is given at a
time. It splits a text into words first (the pre-tokenizer), and each word into tokens by itself; so
a text may be cut between two words, if words stay the same on both sides.

That is known of byte-level tokenizers with the patterns in WORDS. In all of these, a letter is only
ever followed, in the same word, by another letter, and a digit by another digit; nothing looks
back, and they look ahead only behind white space. So between a letter or a digit and a character
that is neither, one word always ends and another begins, and neither depends on what is on the
other side. Other tokenizers are given whole texts.
"""

import functools
import json
import re
import unicodedata

PIECE = 2**15  # characters
# How GPT-2, Llama 3 (also dolma2, GPT-4) and Qwen 2 find words. GPT-2's is what the library's
# ByteLevel does by itself.
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
WORDS = (GPT_2, LLAMA_3, QWEN_2)
# Behind a letter or digit, a character of ASCII that is neither, or a Chinese comma or full stop.
_CUT = re.compile(r"(?<=[^\W_])[\0-/:-@\[-`{-\x7f、。，]")  # noqa: RUF001


def in_pieces(text: str, tokenizer_json: str) -> list[str]:
    """Cuts a text into pieces of about PIECE characters, or not at all.

    Args:
      text: any text.
      tokenizer_json: of the tokenizer that the pieces are for.
    """
    added = _added_tokens(tokenizer_json)
    if added is None:
        return [text]
    pieces, start = [], 0
    while len(text) - start > 2 * PIECE:
        place = _place(text, start + PIECE, added)
        if place is None:
            break
        pieces.append(text[start:place])
        start = place
    return [*pieces, text[start:]]


def _place(text: str, start: int, added: tuple[str, ...]) -> int | None:
    """The first place from `start` on where a text may be cut."""
    for found in _CUT.finditer(text, start):
        place = found.start()
        # Letters and digits for long enough that every version of Unicode says so.
        if unicodedata.ucd_3_2_0.category(text[place - 1])[0] not in "LN":
            continue
        # Tokens that were added to the vocabulary are found before words are, and kept whole.
        around = (text[max(0, place - len(t) + 1) : place + len(t) - 1] for t in added)
        if not any(token in near for token, near in zip(added, around, strict=True)):
            return place
    return None


@functools.lru_cache(maxsize=4)
def _added_tokens(tokenizer_json: str) -> tuple[str, ...] | None:
    """The tokens that a cut must not run through; None if the tokenizer's texts must stay whole."""
    fields = json.loads(tokenizer_json)
    added = fields.get("added_tokens") or []
    changes = [fields.get(name) for name in ("normalizer", "truncation", "padding")]
    reaches_out = any(t[how] for t in added for how in ("lstrip", "rstrip", "single_word"))
    if any(changes) or reaches_out or not _has_known_words(fields.get("pre_tokenizer")):
        return None
    return tuple(t["content"] for t in added)


def _has_known_words(pre_tokenizer: dict | None) -> bool:
    """Whether words are found by one of the patterns in WORDS, and by nothing else."""
    parts = pre_tokenizer or {}
    steps = parts["pretokenizers"] if parts.get("type") == "Sequence" else [parts]
    if steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return False
    if len(steps) == 1:
        return bool(steps[0]["use_regex"])
    split = steps[0]
    return (
        len(steps) == 2
        and not steps[1]["use_regex"]
        and split.get("type") == "Split"
        and split["pattern"].get("Regex") in WORDS
        and split["behavior"] == "Isolated"
        and not split["invert"]
    )
