"""A loaded FlexOlmo: logits, log-likelihoods and generation, with experts switched on or off.

model = flexolmo_jax.load("OUT/merged")
model.generate(["The theorem"], without=["math"])
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.federation.loading import load_model
from flexolmo_jax.inference import continuations, decode, engine, likelihood, masks
from flexolmo_jax.inference.compiled import CompiledNetwork
from flexolmo_jax.inference.continuations import Continuations, Options
from flexolmo_jax.inference.cpu_weights import unstack
from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.inference.layerwise import Network
from flexolmo_jax.inference.likelihood import LogLikelihoods
from flexolmo_jax.inference.mass import mass_by_name, read_mass
from flexolmo_jax.inference.request import Request
from flexolmo_jax.inference.sampling import Sampling
from flexolmo_jax.modeling.experts import Experts
from flexolmo_jax.modeling.transformer import Backbone
from flexolmo_jax.parallel import placement
from flexolmo_jax.parallel.mesh import SERVING, check_for_use
from flexolmo_jax.tracing.index import Index
from flexolmo_jax.tracing.results import Trace
from flexolmo_jax.tracing.trace import of_owners, trace
from flexolmo_jax.trust.trusted import Signed, Trusted


@dataclasses.dataclass(frozen=True)
class FlexOlmo:
    """A model in memory.

    Attributes:
      backbone, experts: the weights; experts in one stack, the public one first.
      config: sizes, routing, dtype.
      expert_names: in the order of the stack.
      tokenizer: None if the model has none; it then takes and returns token ids only.
      ends: ids that end a generated text, in addition to the tokenizer's separator.
      int8: the matrices are rounded to 8-bit integers, and generation on CPU stores them so.
      mesh: the devices that hold the weights, or None for one device. They share each batch, and
        `experts` may end with padding experts.
      signed: its packages and who signed each, if it was loaded with `keys`.

    Examples:
      An expert that is switched off leaves no trace: the logits are those of a merge without it.

      >>> import flexolmo_jax as fo
      >>> without_math = fo.load("ours").logits([[5, 6, 7]], without=["math"])
      >>> shares = fo.merge("anchor", ["experts/code"], "smaller")
      >>> bool((without_math == fo.load("smaller").logits([[5, 6, 7]])).all())
      True
    """

    backbone: Backbone
    experts: Experts
    config: ModelConfig
    expert_names: tuple[str, ...]
    tokenizer: Tokenizer | None
    int8: bool = False
    mesh: Mesh | None = None
    ends: tuple[int, ...] = ()
    signed: tuple[Signed, ...] = ()
    _network_cache: dict = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def logits(
        self,
        tokens,
        without: Sequence[str] = (),
        only: Sequence[str] | None = None,
        allowed=None,
    ) -> jax.Array:
        """Next-token logits.

        Args:
          tokens: int [B, S].
          without: names of experts to switch off.
          only: names of the only experts to use.
          allowed: bool [E] or [B, E], for masks per sequence.

        Returns:
          float32 [B, S, V].

        Raises:
          ValueError: tokens outside the vocabulary, an unknown expert, or none left.

        Examples:
          >>> import flexolmo_jax as fo
          >>> model = fo.load("ours")
          >>> model.logits([[5, 6, 7]], without=["math"]).shape
          (1, 3, 512)
        """
        tokens = continuations.checked_tokens(np.asarray(tokens), self.config.vocab_size)
        mask = self.allowed(len(tokens), without, only, allowed)
        rows = placement.put_padded_batch((tokens, mask), self.mesh)
        with placement.use_mesh(self.mesh):
            logits = likelihood.logits(self.backbone, self.experts, *rows, self.config, self.mesh)
        if self.mesh is not None and len(logits) > len(tokens):  # cannot stay sharded unevenly
            logits = jax.device_put(logits, jax.NamedSharding(self.mesh, P()))
        return logits[: len(tokens)]

    def log_likelihoods(
        self,
        tokens,
        targets=None,
        lengths=None,
        *,
        without: Sequence[str] = (),
        only: Sequence[str] | None = None,
        allowed=None,
        sampling: Sampling | None = None,
    ) -> LogLikelihoods:
        """Log-probabilities of given tokens, each given the tokens before it.

        Args:
          tokens: int [B, S].
          targets: int [B, C, K]: K candidates for the token after each of the last C positions; -1
            is none. Default: every token but the first of `tokens`, with K = 1.
          lengths: int [B], where `tokens` are padded on the right. Default: S.
          without, only, allowed: which experts to use, as in `logits`.
          sampling: score under this truncated distribution. Default: under the model's own.

        Returns:
          float32 and bool NumPy arrays [B, C, K].

        Raises:
          ValueError: as `logits`.
        """
        texts = likelihood.checked(np.asarray(tokens), targets, lengths, self.config.vocab_size)
        mask = self.allowed(len(texts[0]), without, only, allowed)
        rows = placement.put_padded_batch((*texts, mask), self.mesh)
        with placement.use_mesh(self.mesh):
            scores = likelihood.log_likelihoods(
                self.backbone, self.experts, *rows, self.config, self.mesh, sampling
            )
        return LogLikelihoods(*(placement.to_host(x)[: len(mask)] for x in scores))

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        without: Sequence[str] = (),
        only: Sequence[str] | None = None,
        allowed=None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        until: Sequence[str] = (),
        on_mass: Callable[[dict[str, float]], None] | None = None,
    ) -> list[str] | list[list[int]]:
        """Continues prompts, all in one batch.

        A control token spelled in a prompt, such as <|endoftext|>, is read as its characters; pass
        token ids to use the token itself.

        Args:
          prompts: texts, or lists of token ids.
          max_new_tokens: the maximum number of new tokens for each prompt.
          without, only, allowed: which experts to use, as in `logits`.
          temperature: 0 chooses the likeliest token.
          top_k, top_p: truncate the distribution, in this order.
          seed: of the random choices.
          until: texts that end a continuation, which stops before the first of them. Ids may
            contain a few tokens more.
          on_mass: called at the end with each continuation's routing mass: tokens by the name of
            the expert (`inference/mass.py`).

        Returns:
          the continuations, without the prompts: texts for texts, ids for ids.

        Raises:
          ValueError: as `logits`; a text, or `until`, without a tokenizer; an empty prompt; a bad
            option.

        Examples:
          >>> import flexolmo_jax as fo
          >>> model = fo.load("ours")
          >>> [text] = model.generate(["The theorem"], max_new_tokens=8, without=["code"])
          >>> [ids] = model.generate([[5, 6, 7]], max_new_tokens=8, only=["public", "math"])
          >>> len(ids) <= 8
          True
        """
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"prompts must be a list with at least one prompt, found {prompts!r}")
        are_texts = isinstance(prompts[0], str)
        ids = self._prompt_ids(prompts)
        mask = self.allowed(len(ids), without, only, allowed)
        sampling = Sampling(temperature, top_k, top_p)
        ends = continuations.checked_ends(until)
        texts: list[str] = []
        pieces = self._continue(ids, max_new_tokens, mask, sampling, seed, 16 if ends else None)
        for made in pieces:
            generated, ended, _ = made
            if are_texts or ends:
                decode_after = continuations.need_tokenizer(self.tokenizer).decode_after
                texts = [decode_after(*pair) for pair in zip(ids, generated, strict=True)]
            if ends and continuations.all_ended(ended, texts, ends):
                break
        self._tell_mass(on_mass, ids, mask, made)
        return (
            [continuations.before_first(text, ends) for text in texts] if are_texts else generated
        )

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 64,
        without: Sequence[str] = (),
        only: Sequence[str] | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        interval: int = 4,
        on_mass: Callable[[dict[str, float]], None] | None = None,
    ) -> Iterator[str] | Iterator[list[int]]:
        """Continues one prompt, piece by piece; the pieces add up to the result of `generate`.

        Args:
          prompt: a text, or token ids.
          interval: tokens from one piece to the next.
          other arguments, and errors: as in `generate`.

        Yields:
          the next piece: text for text, ids for ids.
        """
        if interval < 1:
            raise ValueError(f"interval must be at least 1 token, found {interval}")
        ids = self._prompt_ids([prompt])  # type: ignore[list-item]
        mask = self.allowed(1, without, only)
        sampling = Sampling(temperature, top_k, top_p)
        yielded_ids = 0
        text = yielded = ""
        for made in self._continue(ids, max_new_tokens, mask, sampling, seed, interval):
            (generated,) = made.generated
            if not isinstance(prompt, str):
                yield generated[yielded_ids:]
                yielded_ids = len(generated)
                continue
            text = continuations.need_tokenizer(self.tokenizer).decode_after(ids[0], generated)
            if not text.endswith("\ufffd"):  # a character may be incomplete
                yield text[len(yielded) :]
                yielded = text
        if len(text) > len(yielded):
            yield text[len(yielded) :]
        self._tell_mass(on_mass, ids, mask, made)

    def _tell_mass(self, tell, prompts, mask, made: Continuations) -> None:
        if tell is None:
            return
        mass, texts = made.mass, (prompts, made.generated, mask)
        if mass is None:
            mass = read_mass(self.backbone, self.experts, *texts, self.config, self.mesh)
        for own in mass:
            tell(mass_by_name(self.expert_names, own))

    def _prompt_ids(self, prompts: Sequence) -> list[list[int]]:
        return continuations.prompt_ids(prompts, self.tokenizer, self.config.vocab_size)

    def _continue(
        self,
        ids: list[list[int]],
        max_new_tokens: int,
        mask: np.ndarray,
        sampling: Sampling,
        seed: int,
        interval: int | None,
    ) -> Iterator[Continuations]:
        sampling.check()
        on_cpu = self._runs_layer_by_layer()
        together = engine.slots_for(len(ids)) if on_cpu else len(ids)
        continuations.check_length(self.config, together, max(map(len, ids)), max_new_tokens)
        options = Options(max_new_tokens, self._stop(), sampling, seed, interval)
        if on_cpu:
            return engine.generate(self._network(together), ids, mask, options)
        return decode.generate(
            self.backbone, self.experts, self.config, ids, mask, options, self.mesh
        )

    def _stop(self) -> list[int]:
        ends = {*self.ends, self.tokenizer.separator} if self.tokenizer else {*self.ends}
        return sorted(end for end in ends if 0 <= end < self.config.vocab_size)

    def engine(self, slots: int = 16, length: int | None = None, prefixes: int = 0) -> Engine:
        """An engine for many requests (`flexolmo_jax.inference.engine`).

        Args:
          slots: how many requests run at a time; rounded up to a multiple of the mesh's devices.
          length: the most tokens of a prompt and its continuation. Default: what the model was made
            for.
          prefixes: how many read prompts are kept, for requests that begin alike.

        Raises:
          ValueError: too little memory.

        Examples:
          >>> import flexolmo_jax as fo
          >>> model = fo.load("ours")
          >>> engine = model.engine(slots=4)
          >>> requests = [model.request([5, 6, 7], 8, without=["math"]), model.request("Once", 8)]
          >>> for request in requests:
          ...     engine.add(request)
          >>> while engine.step():
          ...     pass
          >>> {request.ended for request in requests} <= {"length", "stop"}
          True
        """
        length = length or self.config.max_length
        continuations.check_memory(self.config, slots + prefixes, length, length)
        if self._runs_layer_by_layer():
            return Engine(self._network(slots), slots, length, prefixes)
        count = len(self.expert_names)
        network = CompiledNetwork(self.backbone, self.experts, self.config, count, self.mesh)
        return Engine(network, -(-slots // network.rows) * network.rows, length, prefixes)

    def request(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 64,
        without: Sequence[str] = (),
        only: Sequence[str] | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Request:
        """A request for `engine`; arguments and errors are those of `generate`."""
        sampling = Sampling(temperature, top_k, top_p)
        (ids,) = self._prompt_ids([prompt])
        mask = masks.expert_mask(self.expert_names, 1, without, only, None)[0]
        return Request(ids, max_new_tokens, mask, self._stop(), sampling, seed)

    def trace(
        self,
        text: str,
        indexes: Sequence[Index],
        *,
        prompt: str = "",
        without: Sequence[str] = (),
        only: Sequence[str] | None = None,
        similar: int = 0,
    ) -> Trace:
        """Where the words of a text, as an answer, stand in the documents of owners.

        Args:
          text, indexes, prompt, similar: as in `flexolmo_jax.tracing.trace.trace`; the owner of
            each index has the name of an expert.
          without, only: experts, as in `logits`. If one is off, its owner's documents are not
            searched, and none is named.

        Raises:
          ValueError: as both; an index of an owner without an expert; no index is left.
        """
        is_used = self.allowed(1, without, only)[0]
        used = [name for name, on in zip(self.expert_names, is_used, strict=False) if on]
        kept = of_owners(indexes, used, self.expert_names)
        return trace(text, kept, prompt=prompt, similar=similar)

    def _runs_layer_by_layer(self) -> bool:
        return jax.default_backend() == "cpu" and self.mesh is None

    def _network(self, slots: int) -> Network:
        """The weights in the layout for decoding, cached from the first use on."""
        transposed = slots == 1 and self.config.dtype == "bfloat16"
        if self._network_cache.get("transposed") is not transposed:
            self._network_cache.clear()
            weights = unstack(self.backbone, self.experts, self.config, transposed, self.int8)
            network = Network(self.backbone, self.experts, weights, self.config)
            self._network_cache.update(transposed=transposed, network=network)
        return self._network_cache["network"]

    def allowed(
        self,
        batch: int,
        without: Sequence[str] = (),
        only: Sequence[str] | None = None,
        allowed=None,
    ) -> np.ndarray:
        """The experts that each sequence may use, by names and by a mask: bool [B, E].

        Raises:
          ValueError: an unknown name, a mask of another shape, or a sequence without any expert.
        """
        mask = masks.expert_mask(self.expert_names, batch, without, only, allowed)
        padding_experts = self.experts.router.bias.shape[1] - len(self.expert_names)
        return np.pad(mask, ((0, 0), (0, padding_experts)))


def load(
    path: str | Path,
    *,
    anchor: str | Path | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    separator: str | None = None,
    keys: str | Path | None = None,
) -> FlexOlmo:
    """Loads a model, after checking every digest.

    Args:
      path: a merged model, an anchor, an expert package (loaded with its anchor as the owner's
        two-expert model), or a Hugging Face directory (FlexOlmo or OLMo 2).
      anchor: for an expert package: its anchor. Default: a folder named `anchor` beside the
        package or up to two levels above it.
      dtype: "float32" or "bfloat16", of weights and activations; default: as stored. "int8" rounds
        the matrices to 8 bits with a scale for each output channel, which generation on CPU reads
        several times faster; activations are float32.
      mesh: spreads the model over several devices (`make_mesh`, without `tensor_parallel`).
      separator: the token that opens documents, where a Hugging Face directory names none; default:
        what the directory says, or what was named when the experts were trained.
      keys: a registry (`flexolmo registry`) that says who may sign each package; what it or its log
        revoked is refused before a weight is read. Default: signatures are not looked at.

    Raises:
      ValueError: a part is missing, damaged, made for something else, unsigned or revoked; int8 on
        GPU or TPU, or on several devices; sizes that the devices do not divide.

    Examples:
      >>> import flexolmo_jax as fo
      >>> model = fo.load("ours")
      >>> model.expert_names
      ('public', 'math', 'code')
    """
    int8 = dtype == "int8"
    check_for_use(mesh, int8)
    signed: list[Signed] = []
    require = None if keys is None else Trusted.open(keys).checking(signed.append)
    loaded = load_model(Path(path), anchor, dtype, mesh, SERVING, separator, require)
    config = loaded.config
    if int8:
        config = config.replace(dtype="float32", expert_compute="dense")
    elif dtype is not None:
        config = config.replace(dtype=dtype)
    own = (loaded.names, loaded.tokenizer, int8, mesh, loaded.ends, tuple(signed))
    return FlexOlmo(loaded.backbone, loaded.experts, config, *own)
