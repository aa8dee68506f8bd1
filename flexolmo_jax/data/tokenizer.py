"""Tokenizers: train a byte-level BPE on public text, or load any tokenizer.json.

A text is only ever text here: characters that spell a control token are encoded as characters, and
what cuts, pads or varies texts in a tokenizer.json is switched off when it is read.
"""

import functools
import hashlib
import json as json_text
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

SEPARATOR = "<|endoftext|>"
_SPACE = re.compile(r"[ \t\n\r]*")


class Tokenizer:
    """A `tokenizers` tokenizer, with the token that opens every document, and a digest.

    Args:
      json: a tokenizer.json.
      separator: name of the token that opens every document.
      where: what errors call the tokenizer.
      embeddings: how many ids the model has embeddings for; texts with others are refused. None:
        of no model.

    Attributes:
      vocab_size: the highest id, and one more; special tokens included.
      embeddings: as given, but never more than `vocab_size`, which it is of no model.
      separator: id of the token before every document; predicting it means "the text ends here".
      json: the tokenizer.json as it is used and stored with an anchor: without truncation, padding
        and dropout, otherwise byte for byte as it was given.
      digest: sha256 of `json`, so that files that differ in no more than those are the same.

    Raises:
      ValueError: `json` is no tokenizer, or has no such separator within the embeddings.
    """

    def __init__(
        self,
        json: str,
        separator: str = SEPARATOR,
        where: str = "tokenizer",
        embeddings: int | None = None,
    ):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{where}: not a tokenizer.json ({error})") from error
        self.json = as_used(json)
        if self.json != json:
            self._tokenizer = tokenizers.Tokenizer.from_str(self.json)
        found = self._tokenizer.token_to_id(separator)
        added = self._tokenizer.get_added_tokens_decoder()
        control = {number: token.content for number, token in added.items() if token.special}
        if found is None:
            raise ValueError(
                f"{where}: the tokenizer has no token {separator!r}, which must open every "
                "document; name another one with --separator (separator= in Python); its control "
                f"tokens are {', '.join(map(repr, control.values())) or 'none'}"
            )
        if embeddings is not None and found >= embeddings:
            raise ValueError(
                f"{where}: the token {separator!r}, which must open every document, has id "
                f"{found}, and the model has embeddings for ids below {embeddings} only; name "
                "another one with --separator (separator= in Python)"
            )
        # The library keeps neither of the two in its files, nor in copies.
        self._tokenizer.add_special_tokens([separator])  # whatever the file says that it is
        self._tokenizer.encode_special_tokens = True
        fields = json_text.loads(self.json)
        self._control = {*control, found} - {_unknown(fields["model"], self._tokenizer)}
        self._composes = "NFC" in _types(fields.get("normalizer"))
        self._is_of_bytes = (
            fields.get("normalizer") is None
            and _types(fields.get("decoder")) == ["ByteLevel"]
            and self._tokenizer.get_vocab().keys() >= set(pre_tokenizers.ByteLevel.alphabet())
            # Such a token removes the white space around it; special ones are never read.
            and not any((t.lstrip or t.rstrip) and not t.special for t in added.values())
        )
        self._has_warned = False
        self.separator = found
        self.separator_text = separator
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())
        self.embeddings = min(self.vocab_size, embeddings or self.vocab_size)
        self.digest = hashlib.sha256(self.json.encode()).hexdigest()

    @classmethod
    def load(
        cls, path: str | Path, separator: str = SEPARATOR, embeddings: int | None = None
    ) -> "Tokenizer":
        """Reads a tokenizer.json. Raises ValueError when it is missing or not one."""
        try:
            json = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot read the tokenizer ({error})") from error
        return cls(json, separator, str(path), embeddings)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, separator: str = SEPARATOR
    ) -> "Tokenizer":
        """Trains a byte-level BPE of at most `vocab_size` ids (at least 257) on public text."""
        if vocab_size < 257:
            raise ValueError(
                f"vocab_size must be at least 257 (256 bytes and {separator!r}), found {vocab_size}"
            )
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=[separator],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        # A prompt starts as every document did in training: with the separator.
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{separator} $A", special_tokens=[(separator, tokenizer.token_to_id(separator))]
        )
        return cls(tokenizer.to_str(), separator)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt, with whatever the tokenizer puts in front of one.

        What it puts behind a text, as a separator, is left out: the prompt would be at its end.

        Raises:
          ValueError: the text is not valid Unicode, or holds what cannot be given to the model.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            near = text[max(0, error.start - 20) : error.start + 20]
            raise ValueError(
                f"the prompt is not valid UTF-8 at character {error.start + 1} ({ascii(near)}): "
                "was it typed or read in another encoding, such as Latin-1?"
            ) from error
        # `encode` would hold Python's lock meanwhile: a server would answer nobody else.
        [encoded] = self._tokenizer.encode_batch([text])
        ids, is_put_in = encoded.ids, encoded.special_tokens_mask
        own = [number for number, put_in in zip(ids, is_put_in, strict=True) if not put_in]
        while own and is_put_in[len(ids) - 1]:
            ids.pop()
        self._check(own, text, "the prompt")
        self._check_whole(text, self.decode(own), "the prompt", refuse=False)
        self._check_embedded(ids, "the prompt")
        return ids or [self.separator]

    def encode_as_transformers(self, text: str, opened: bool) -> list[int]:
        """Ids as a tokenizer of `transformers` gives them: spelled control tokens are read as such.

        Only lm-evaluation-harness's prompts are, so that scores equal its own adapter's.

        Args:
          text: to encode.
          opened: by what the tokenizer puts in front of a prompt.
        """
        [encoded] = self._reads_control_tokens.encode_batch([text], add_special_tokens=opened)
        ids = encoded.ids
        self._check_embedded(ids, "a text")
        return ids

    @functools.cached_property
    def _reads_control_tokens(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self.json)

    def encode_documents(
        self, texts: Sequence[str], names: Sequence[str] = (), whole: bool = False
    ) -> list[list[int]]:
        """Ids of whole documents, each opened by the separator.

        Args:
          texts: of the documents.
          names: of the documents, for errors: "file:row".
          whole: refuse a text of which the ids do not hold everything (unknown characters,
            capitals that are made small); else there is one warning, of the first.

        Raises:
          ValueError: a text holds a token without an embedding, or spells a control token that
            the tokenizer cannot write in characters; or as `whole` says.
        """
        names = [name or "a text" for name in names] or ["a text"] * len(texts)
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        all_ids = [one.ids for one in encoded]
        for ids, text, name in zip(all_ids, texts, names, strict=True):
            self._check(ids, text, name)
        if whole or not (self._is_of_bytes or self._has_warned):
            written = self._tokenizer.decode_batch(all_ids)
            for text, back, name in zip(texts, written, names, strict=True):
                self._check_whole(text, back, name, whole)
        return [[self.separator, *ids] for ids in all_ids]

    def size(self, text: str) -> int:
        """Bytes of a text in UTF-8, as the tokenizer reads it: composed, if it composes."""
        return len(self._read(text).encode())

    def _read(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self._composes else text

    def _check(self, ids: Sequence[int], text: str, name: str) -> None:
        """Raises ValueError if the ids of a text hold what no text may."""
        self._check_embedded(ids, name)
        if not self._control.isdisjoint(ids):
            token = str(self._tokenizer.id_to_token(next(x for x in ids if x in self._control)))
            at = text.find(token)
            raise ValueError(
                f"{name}: the text spells {token!r}, a control token"
                + (f" (near {text[max(0, at - 20) : at + 40]!r})" if at >= 0 else "")
                + ", and this tokenizer cannot write it in other pieces; remove it from the text"
            )

    def _check_embedded(self, ids: Sequence[int], name: str) -> None:
        if max(ids, default=0) < self.embeddings:
            return
        number = next(x for x in ids if x >= self.embeddings)
        raise ValueError(
            f"{name}: the token {self._tokenizer.id_to_token(number)!r} has id {number}, and the "
            f"model has embeddings for ids below {self.embeddings} only: remove it from the text, "
            "or use the tokenizer that the model was trained with"
        )

    def _check_whole(self, text: str, back: str, name: str, refuse: bool) -> None:
        """Raises ValueError, or warns for the first time, if decoded ids are not the text."""
        text = self._read(text)
        # SentencePiece puts a space in front of a text, which decoding removes.
        if text == back or text == " " + back or " " + text == back:
            return
        lost = sorted(set(text) - set(back))[:5]
        if lost:
            what = f"cannot write {', '.join(f'{x!r} (U+{ord(x):04X})' for x in lost)}"
        else:
            pairs = enumerate(zip(text, back, strict=False))
            at = next((n for n, (a, b) in pairs if a != b), min(len(text), len(back)))
            around = slice(max(0, at - 10), at + 20)
            what = f"makes {back[around]!r} of {text[around]!r}"
        said = f"{name}: the tokenizer {what}"
        if refuse:
            raise ValueError(
                f"{said}, so that bits per byte would not count what it costs; leave such texts "
                "out, or use a model whose tokenizer writes every byte"
            )
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(f"{said}: the model sees nothing of what is lost", stacklevel=2)

    def names(self) -> list[str]:
        """Of all ids, in order; in a byte-level BPE each character of one stands for a byte."""
        return [self._tokenizer.id_to_token(number) or "" for number in range(self.vocab_size)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text that ids stand for; control tokens, which are no text, are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text of ids that continue others.

        A SentencePiece-like tokenizer leaves out the space at the beginning of what it decodes; in
        the middle of a text that space is between two words.
        """
        start, both = self.decode(before), self.decode([*before, *ids])
        return both[len(start) :] if both.startswith(start) else self.decode(ids)


def as_used(json: str) -> str:
    """A tokenizer.json without truncation, padding and dropout, otherwise byte for byte."""
    fields = json_text.loads(json)
    for path in (("truncation",), ("padding",), ("model", "dropout")):
        value, start = fields, 0
        for name in path:
            value = value.get(name)
            if not value:
                break
            start, end = _value(json, start, name)
        else:
            json = f"{json[:start]}null{json[end:]}"
    return json


def _value(json: str, start: int, name: str) -> tuple[int, int]:
    """Where a value begins and ends, in the text of the object that begins at or after `start`."""
    read = json_text.JSONDecoder().raw_decode

    def after_space(at: int) -> int:
        found = _SPACE.match(json, at)
        assert found is not None
        return found.end()

    at = after_space(start)  # of the brace, then of each comma
    while True:
        key, at = read(json, after_space(at + 1))
        begin = after_space(after_space(at) + 1)  # behind the colon
        _, end = read(json, begin)
        if key == name:
            return begin, end
        at = after_space(end)


def _types(part: dict | None) -> list[str]:
    """The kinds of a normalizer, or a decoder, and of what it is made of."""
    if part is None:
        return []
    parts = next((v for v in part.values() if isinstance(v, list)), None)
    return [part["type"]] if part["type"] != "Sequence" else sum(map(_types, parts or []), [])


def _unknown(model: dict, tokenizer: tokenizers.Tokenizer) -> int | None:
    """The id of what stands for unknown characters, if there is one."""
    name = model.get("unk_token")
    return model.get("unk_id") if name is None else tokenizer.token_to_id(name)
