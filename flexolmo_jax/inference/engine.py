"""Many requests at a time: they join and leave token by token.

A step reads a prompt that waits, or gives every running request its next token; between two of
these it reads a bounded number of prompts' tokens. A request has a *slot*, a row of the batch,
until it ends. Prompts are read alone and in chunks of fixed lengths, so its tokens depend on no
other request, and a new prompt length compiles nothing.

A request that runs alone has its next token read before Python knows it, so that the device does
not wait for Python; of a request that turns out to have ended, this is one token in vain.
"""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.inference.compiled import CompiledNetwork
from flexolmo_jax.inference.continuations import Continuations, Options
from flexolmo_jax.inference.layerwise import GATHER_MIN_TOKENS, Network, Reading, Scores
from flexolmo_jax.inference.prefixes import Prefix, Prefixes
from flexolmo_jax.inference.request import Request
from flexolmo_jax.inference.sampling import Sampling, num_candidates, sample
from flexolmo_jax.inference.sequences import Tokens

CHUNKS = (16, 32, 128, 512)  # tokens of a prompt that are read in one call
SHARED_CHUNKS = CHUNKS[:-1]  # for prompts that begin alike: they are kept where a chunk ends
PROMPT_TOKENS_BETWEEN = 512  # two tokens of a running request, at most
MAX_BIASES = 300  # of a request, as OpenAI's interface allows
# One of each kind that takes a program of its own.
SAMPLINGS = (Sampling(), Sampling(1.0), Sampling(1.0, None, 0.5), Sampling(1.0, 50))
MAX_SLOTS = 32  # with more, experts would read all tokens (`Network.gathers_few`)


@dataclasses.dataclass
class _Prompt:
    """A request whose prompt is being read."""

    request: Request
    sequence: Any  # of the network, a batch of one
    read: int  # tokens so far
    logits: jax.Array | None = None  # after the last token of the prompt
    shares: Any = None  # float32 [E, 1], at that token


class Engine:
    """Runs requests over one model.

    Args:
      network: the model.
      slots: how many requests run at a time; a multiple of the network's `rows`.
      length: the most tokens of a prompt and its continuation.
      prefixes: how many read prompts are kept, for requests that begin alike with the same experts.

    Examples:
      `FlexOlmo.engine` makes one.

      >>> import flexolmo_jax as fo
      >>> model = fo.load("ours")
      >>> engine, request = model.engine(slots=2), model.request([5, 6, 7], 60)
      >>> engine.add(request)
      >>> more = [engine.step() for _ in range(3)]
      >>> engine.cancel(request)
      >>> len(request.generated), request.ended
      (3, 'cancelled')
    """

    def __init__(
        self, network: Network | CompiledNetwork, slots: int, length: int, prefixes: int = 0
    ):
        self._network, self._length = network, length
        self._sequences: Any = network.empty(slots, length)
        self._logits: jax.Array | None = None  # float32 [slots, V]
        self._shares: Any = np.zeros((network.num_experts, slots), np.float32)
        self._running: list[Request | None] = [None] * slots
        self._undecided: dict[int, Request] = {}  # by slot: those whose next token is to be chosen
        self._prompt_tokens_left = PROMPT_TOKENS_BETWEEN
        self._waiting: collections.deque[Request] = collections.deque()
        self._reading: _Prompt | None = None
        in_background = isinstance(network, Network) and network.reads_in_background(slots)
        self._reads_ahead = in_background and slots == 1
        self._ahead: Reading | None = None  # of the token that was chosen last
        self._chunks = SHARED_CHUNKS if prefixes > 1 else CHUNKS  # one is kept for equal prompts
        self._prefixes = Prefixes(prefixes, self._chunks[-1])

    def add(self, request: Request) -> None:
        """Queues a request.

        Raises:
          ValueError: it is empty or too long, its tokens or experts are not the model's, or it
            allows no expert.
        """
        self.check(request)
        self._waiting.append(request)

    def check(self, request: Request) -> None:
        """Raises ValueError, as `add`; any thread may call it."""
        total = len(request.prompt) + request.max_new_tokens
        fewest = 0 if request.scores_prompt else 1
        if not len(request.prompt) or request.max_new_tokens < fewest or total > self._length:
            raise ValueError(
                f"a request needs a prompt, at least one new token, and at most {self._length} "
                f"tokens together; found {len(request.prompt)} and {request.max_new_tokens}"
            )
        vocabulary, experts = self._network.config.vocab_size, self._network.num_experts
        if min(request.prompt) < 0 or max(request.prompt) >= vocabulary:
            raise ValueError(
                f"a prompt has tokens in [0, {vocabulary}), the vocabulary; found "
                f"{min(request.prompt)} to {max(request.prompt)}"
            )
        if np.shape(request.allowed) != (experts,) or not np.any(request.allowed):
            raise ValueError(
                f"allowed must be bool [{experts}], with at least one expert, found "
                f"{np.asarray(request.allowed).astype(int).tolist()}"
            )
        if any(not 0 <= token < vocabulary for token in request.bias):
            raise ValueError(f"a bias is for tokens in [0, {vocabulary}), found {request.bias}")
        if len(request.bias) > MAX_BIASES:
            raise ValueError(
                f"a request has biases for at most {MAX_BIASES} tokens, found {len(request.bias)}"
            )
        request.sampling.check()

    def cancel(self, request: Request, reason: str = "cancelled") -> None:
        """Ends a request; its slot is free from the next step on."""
        if request.ended is None:
            request.ended = reason

    def compile(self) -> None:
        """Compiles what requests may need, for seconds, so that none of them waits for it.

        All but this: programs for how many tokens of a longer prompt use an expert.
        """
        allowed = np.ones(self._network.num_experts, bool)
        prompts = [Request([0] * min(x, self._length - 1), 1, allowed) for x in self._chunks]
        if isinstance(self._network, Network):
            with concurrent.futures.ThreadPoolExecutor(1) as other:  # XLA compiles on one core
                counts = {chunk for chunk in self._chunks if chunk < GATHER_MIN_TOKENS}
                if not self._network.reads_in_background(len(self._running)):
                    counts |= {len(self._running)} - {1}
                few = other.map(self._network.gathers_few, counts)
                for request in prompts:
                    reading = self._begin(request)
                    self._read_chunk(reading, self._next_chunk(reading))
                list(few)  # waits, and raises
        for sampling in SAMPLINGS:
            count = min(2, self._length - 1)
            self.add(Request([0], count, allowed, sampling=sampling, scored=True))
        for request in prompts:
            self.add(request)
        while self.step():
            pass

    def step(self) -> bool:
        """Reads a prompt, or a part of it, or else gives each running request its next token.

        A prompt that is read to its end gets its first token in the same step. A step ends as soon
        as tokens are chosen, so nobody waits for one while the one after it is computed.

        Returns:
          whether a request is left.
        """
        self._free_slots()
        if not self._read_prompt():
            self._prompt_tokens_left = PROMPT_TOKENS_BETWEEN
            if any(self._running):
                self._read_tokens()
        if self._undecided:
            self._choose_tokens()
            self._free_slots()
        return any(self._running) or self._reading is not None or bool(self._waiting)

    def _free_slots(self) -> None:
        for slot, request in enumerate(self._running):
            if request is not None and request.ended is not None:
                self._running[slot] = None

    def _read_prompt(self) -> bool:
        """Reads on, to the end of a prompt at most; returns whether it could."""
        reading = self._next_prompt() if None in self._running else None
        if reading is None:
            return False
        before = reading.read
        while reading.logits is None:
            chunk = self._next_chunk(reading)
            if chunk > self._prompt_tokens_left:
                return reading.read > before
            self._prompt_tokens_left -= chunk
            self._read_chunk(reading, chunk)
        if reading.request.max_new_tokens:
            self._place(reading, self._running.index(None))
        else:
            reading.request.ended = "length"
        self._reading = None
        return True

    def _next_prompt(self) -> _Prompt | None:
        """The one to read on; those that were cancelled are not read."""
        if self._reading is not None and self._reading.request.ended is not None:
            self._reading = None
        while self._reading is None and self._waiting:
            request = self._waiting.popleft()
            if request.ended is None:
                self._reading = self._begin(request)
        return self._reading

    def _begin(self, request: Request) -> _Prompt:
        known = None
        if not request.scores_prompt:
            known = self._prefixes.longest(request.prompt, request.allowed)
        if known is not None:
            return _Prompt(request, *known)
        return _Prompt(request, self._network.empty(1, self._length), 0)

    def _next_chunk(self, reading: _Prompt) -> int:
        left = len(reading.request.prompt) - reading.read
        *smaller, largest = self._chunks
        if left <= largest // 2:  # else several smaller ones take less time than a largest one
            largest = smaller[-1]
        return next((size for size in smaller if size >= left), largest)

    def _read_chunk(self, reading: _Prompt, chunk: int) -> None:
        request, first = reading.request, reading.read
        left = len(request.prompt) - first
        ids = np.zeros((1, chunk), np.int32)
        count = min(left, chunk)
        ids[0, :count] = request.prompt[first : first + count]
        tokens = Tokens(
            ids, np.full(1, first, np.int32), np.full(1, count, np.int32), request.allowed[None]
        )
        following = None
        if request.scores_prompt:
            following = np.zeros((1, chunk), np.int32)
            own = request.prompt[first + 1 : first + count + 1]
            following[0, : len(own)] = own
        logits, reading.sequence, shares, scores = self._network(
            tokens, reading.sequence, following
        )
        if scores is not None:
            row = Scores(*(np.asarray(x)[0] for x in scores))
            request.prompt_scores += [Scores(*(x[at] for x in row)) for at in range(len(own))]
        reading.read += count
        if count == left:
            reading.logits, reading.shares = logits, shares
        if not request.scores_prompt:  # such a text is read once
            known = Prefix(reading.sequence, reading.read, reading.logits, reading.shares)
            self._prefixes.keep(request.prompt, request.allowed, known)

    def _place(self, reading: _Prompt, slot: int) -> None:
        slots = len(self._running)
        assert reading.logits is not None and reading.shares is not None
        if slots == 1:
            self._sequences, self._logits = reading.sequence, reading.logits
            self._shares, self._ahead = reading.shares, None
        else:
            if self._logits is None:
                self._logits = jnp.zeros((slots, reading.logits.shape[-1]))
            self._sequences = self._network.place(
                self._sequences, reading.sequence, slot, reading.read
            )
            self._logits = _replace_row(self._logits, reading.logits, np.int32(slot))
            self._shares = np.array(self._shares)
            self._shares[:, slot] = reading.shares[:, 0]
        self._running[slot] = reading.request
        self._undecided[slot] = reading.request

    def _choose_tokens(self) -> None:
        logits = self._biased()
        rows: dict[tuple, list[int]] = {}  # slots that one program can sample for
        for slot, request in self._undecided.items():
            temperature, top_k, top_p = request.sampling
            kind = () if temperature == 0 else _kind(top_k, top_p, logits.shape[-1])
            rows.setdefault(kind, []).append(slot)
        drawn = [
            self._sampled(logits, kind, slots) if kind else _greedy(logits)
            for kind, slots in rows.items()
        ]
        if self._reads_ahead:
            self._read_ahead(*drawn)
        chosen = np.zeros(len(self._running), np.int32)
        for own, slots in zip(drawn, rows.values(), strict=True):
            chosen[slots] = np.asarray(own)[slots]
        scores = None
        if any(request.scored for request in self._undecided.values()):
            # Without bias and temperature.
            scores = jax.tree.map(np.asarray, _score(self._logits, chosen))
        shares = np.asarray(self._shares)
        for slot, request in self._undecided.items():
            own = None
            if scores is not None and request.scored:
                own = Scores(*(x[slot] for x in scores))
            request.take(int(chosen[slot]), shares[:, slot].copy(), own)
        self._undecided.clear()

    def _biased(self) -> jax.Array:
        """The logits with the biases of all requests."""
        assert self._logits is not None
        if not any(request.bias for request in self._undecided.values()):
            return self._logits
        slots, vocabulary = self._logits.shape
        tokens = np.full((slots, MAX_BIASES), vocabulary, np.int32)  # these are dropped
        biases = np.zeros((slots, MAX_BIASES), np.float32)
        for slot, request in self._undecided.items():
            tokens[slot, : len(request.bias)] = list(request.bias)
            biases[slot, : len(request.bias)] = list(request.bias.values())
        return _add_biases(self._logits, tokens, biases)

    def _sampled(self, logits: jax.Array, kind: tuple, slots: list[int]) -> jax.Array:
        """One token for each slot; those of other slots than `slots` mean nothing."""
        numbers = np.zeros((3, len(self._running)), np.uint32)  # seeds, numbers and steps
        temperature, top_p = np.ones((2, len(self._running), 1), np.float32)
        top_k = np.ones((len(self._running), 1), np.int32)
        for slot in slots:
            request = self._undecided[slot]
            numbers[:, slot] = request.seed % 2**32, request.number, len(request.generated)
            own = request.sampling
            temperature[slot], top_p[slot] = own.temperature, own.top_p or 1
            top_k[slot] = own.top_k or 1
        size, is_top_k, is_top_p = kind
        return _draw(
            logits, numbers, temperature, top_k if is_top_k else None, top_p if is_top_p else None,
            size=size,
        )  # fmt: skip

    def _read_ahead(self, chosen: jax.Array) -> None:
        """Has the token read that the only request gets, which Python does not know yet."""
        request = self._undecided[0]
        if len(request.generated) + 1 < request.max_new_tokens:
            self._ahead = self._read(chosen.reshape(1, 1), 0)
            self._sequences = self._ahead.sequences  # the others are donated

    def _read_tokens(self) -> None:
        running = enumerate(self._running)
        self._undecided = {slot: request for slot, request in running if request is not None}
        reading, self._ahead = self._ahead, None
        if reading is None:
            ids = np.zeros((len(self._running), 1), np.int32)
            for slot, request in self._undecided.items():
                ids[slot] = request.generated[-1]
            reading = self._read(ids, -1)
        self._logits, self._sequences, self._shares, _ = reading

    def _read(self, ids: np.ndarray | jax.Array, offset: int) -> Reading:
        """Reads ids [slots, 1], at positions that are this far from those of the next tokens."""
        slots = len(self._running)
        start, lengths = np.zeros((2, slots), np.int32)
        allowed = np.zeros((slots, self._network.num_experts), bool)
        for slot, request in self._undecided.items():
            start[slot] = len(request.prompt) + len(request.generated) + offset
            lengths[slot], allowed[slot] = 1, request.allowed
        return self._network(Tokens(ids, start, lengths, allowed), self._sequences)


@functools.partial(jax.jit, donate_argnums=0)
def _replace_row(rows: jax.Array, row: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(rows, row, index, 0)


@jax.jit
def _add_biases(logits, tokens, biases):
    rows = jnp.arange(len(logits))[:, None]
    return logits.at[rows, tokens].add(biases, mode="drop")


_score = jax.jit(Scores.of)


@jax.jit
def _greedy(logits: jax.Array) -> jax.Array:
    return sample(logits, jnp.zeros(()), Sampling())


def _kind(top_k: int | None, top_p: float | None, vocabulary: int) -> tuple[int, bool, bool]:
    """What the program of a way of sampling is compiled for."""
    is_top_k = top_k is not None and top_k < vocabulary
    return num_candidates(top_k, vocabulary), is_top_k, top_p is not None and top_p < 1


@functools.partial(jax.jit, static_argnames="size")
def _draw(logits, numbers, temperature, top_k, top_p, *, size):
    """Tokens [B] of logits [B, V]; `numbers` are seeds, numbers and steps, uint32 [3, B]."""

    def key(seed, number, step):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), step)

    return sample(logits, jax.vmap(key)(*numbers), Sampling(temperature, top_k, top_p), size)


def slots_for(prompts: int) -> int:
    """How many of that many prompts `generate` continues at a time."""
    return min(1 << (prompts - 1).bit_length(), MAX_SLOTS)


def generate(
    network: Network, prompts: Sequence[Sequence[int]], allowed: np.ndarray, options: Options
) -> Iterator[Continuations]:
    """Continues prompts, as `decode.generate` does on accelerators, with the same arguments.

    Equal prompts, one after the other, are read once.
    """
    max_new_tokens, stop, sampling, seed, interval = options
    repeat = len(set(map(tuple, prompts))) < len(prompts)  # keeping what was read copies it
    length = max(map(len, prompts)) + max_new_tokens
    engine = Engine(network, slots_for(len(prompts)), length, prefixes=int(repeat))
    requests = [
        Request(prompt, max_new_tokens, mask, stop, sampling, seed, number)
        for number, (prompt, mask) in enumerate(zip(prompts, allowed, strict=True))
    ]
    for request in requests:
        engine.add(request)
    is_left, due = True, interval or max_new_tokens
    while is_left:
        is_left = engine.step()
        if not is_left or max(len(request.generated) for request in requests) >= due:
            due += interval or max_new_tokens
            ended = [request.ended is not None for request in requests]
            generated = [list(request.generated) for request in requests]
            yield Continuations(generated, ended, np.stack([x.mass for x in requests]))
