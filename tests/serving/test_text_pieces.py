"""The text of a stream is the text of the whole, and ends where a stop begins."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.serving.pieces import Pieces

TEXT = "Größe, naïve café, 日本語, \U0001f469‍\U0001f52c and plain words; plain words again"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT] * 3, 290)


def joined(pieces, ids):
    shown = [piece for token in ids for piece in pieces.take(token)]
    return shown + pieces.end()


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 280), max_size=40), length=st.integers(0, 30))
def test_pieces_add_up_to_the_decoded_text(tokenizer, ids, length):
    """Also of random tokens, which spell broken characters."""
    before = tokenizer.encode_prompt(TEXT[:length])
    shown = joined(Pieces(tokenizer, before), ids)
    assert "".join(piece.text for piece in shown) == tokenizer.decode_after(before, ids)
    assert [piece.index for piece in shown] == list(range(len(ids)))


def test_no_piece_ends_within_a_character(tokenizer):
    ids = tokenizer.encode_prompt(TEXT)
    pieces = Pieces(tokenizer, [])
    texts = [piece.text for token in ids for piece in pieces.take(token)]
    assert "".join(texts) == TEXT and not any("\ufffd" in text for text in texts)


@given(
    stops=st.lists(st.sampled_from(["plain", "words;", "ain wo", "café, 日", "zzz"]), min_size=1)
)
def test_the_first_stop_ends_the_text(tokenizer, stops):
    """As if the text had been cut afterwards; nothing of a stop is ever shown."""
    places = [TEXT.find(stop) for stop in stops if stop in TEXT]
    expected = TEXT[: min(places)] if places else TEXT
    pieces, shown = Pieces(tokenizer, [], stops), ""
    for token in tokenizer.encode_prompt(TEXT):
        shown += "".join(piece.text for piece in pieces.take(token))
        assert expected.startswith(shown)
        if pieces.stopped:
            break
    shown += "".join(piece.text for piece in pieces.end())
    assert shown == expected and (pieces.stopped is not None) == bool(places)
