"""Tokenizers: train a byte-level BPE on public text, or load any tokenizer.json."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers


class Tokenizer:
    """A `tokenizers` tokenizer, with the token that opens every document, and a digest.

    Attributes:
      vocab_size: number of ids, special ones included.
      separator: id of the token before every document; predicting it means "the text ends here".
      json: the tokenizer.json, as it is stored with an anchor.
      digest: sha256 of `json`.
    """

    def __init__(self, json: str, separator: str = "<|endoftext|>", where: str = "tokenizer"):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{where}: not a tokenizer.json ({error})") from error
        found = self._tokenizer.token_to_id(separator)
        if found is None:
            raise ValueError(
                f"{where}: the tokenizer has no token {separator!r}, which must open every "
                "document; name another one as `separator`"
            )
        self.json = json
        self.separator = found
        self.separator_text = separator
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.digest = hashlib.sha256(json.encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path, separator: str = "<|endoftext|>") -> "Tokenizer":
        """Reads a tokenizer.json. Raises ValueError when it is missing or not one."""
        try:
            json = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot read the tokenizer ({error})") from error
        return cls(json, separator, str(path))

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, separator: str = "<|endoftext|>"
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
        """Ids of a prompt, with whatever the tokenizer puts in front of one."""
        return self._tokenizer.encode(text).ids or [self.separator]

    def encode(self, text: str, opened: bool) -> list[int]:
        """Ids of a text as it is, or `opened` by what the tokenizer puts in front of a prompt."""
        return self._tokenizer.encode(text, add_special_tokens=opened).ids

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole documents, each opened by the separator."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [[self.separator, *one.ids] for one in encoded]

    def names(self) -> list[str]:
        """Of all ids, in order; in a byte-level BPE each character of one stands for a byte."""
        return [self._tokenizer.id_to_token(number) or "" for number in range(self.vocab_size)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)
