"""FlexOlmo with what transformers' FlexOlmoForCausalLM has no place for, in PyTorch.

`flexolmo export` writes this file beside the weights of such a model. `AutoModelForCausalLM` loads
it with `trust_remote_code=True`; it needs PyTorch and transformers 5.16 or newer, and nothing of
flexolmo_jax.

Attention, norms and feed-forward networks are those of OLMo 2. Added are, each where the config has
it: router biases, a router memory, evidence routing, and a head for each expert.

Routing with a memory, or by evidence, depends on all earlier tokens of a text. What it needs of
them are a few numbers per token, which `_remember` keeps in further layers of transformers' cache,
after those of the network, as if they were keys. Whatever `generate` does to a cache (reorder
beams, crop what was rejected, repeat a batch), it does to them too.

Letters in shapes: B batch, S new tokens, T all tokens of the cache, D width, E experts, R rank of a
head, V vocabulary.
"""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config
from transformers.models.olmo2.modeling_olmo2 import (
    Olmo2Attention,
    Olmo2MLP,
    Olmo2PreTrainedModel,
    Olmo2RMSNorm,
    Olmo2RotaryEmbedding,
)
from transformers.utils import can_return_tuple

CHUNK = 128  # positions of which the evidence heads' logits are in memory at a time


class FlexOlmoJaxConfig(Olmo2Config):
    """The fields of OLMo 2, and those of the mixture.

    Attributes:
      num_experts, num_experts_per_tok, norm_topk_prob: as in FlexOlmoConfig.
      expert_names: in the order of the weights; the public expert is the first, unless left out.
      head_ranks: of each expert's own head; 0 is none.
      memory: {"decay", "weight"} of earlier tokens in routing by rows.
      evidence: {"decay", "strength", "shifts"} of evidence routing, with a shift for each expert;
        the router's rows are then not used.
      evidence_ranks: of each expert's bigram model.
    """

    model_type = "flexolmo_jax"
    base_model_tp_plan: ClassVar[dict] = {}
    base_model_pp_plan: ClassVar[dict] = {}

    num_experts: int = 1
    num_experts_per_tok: int = 1
    norm_topk_prob: bool = False
    expert_names: list[str] | None = None
    head_ranks: list[int] | None = None
    memory: dict | None = None
    evidence: dict | None = None
    evidence_ranks: list[int] | None = None


class Router(nn.Module):
    """Logits x . row + min(bias, 0) of each expert, in float32."""

    def __init__(self, config: FlexOlmoJaxConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, E]."""
        return F.linear(x.float(), self.weight.float(), self.bias.float().clamp(max=0))


class LowRankHead(nn.Module):
    """x a b + bias: what an expert adds to the logits of the model's head."""

    def __init__(self, width: int, rank: int, vocab_size: int):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(width, rank))
        self.b = nn.Parameter(torch.zeros(rank, vocab_size))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> float32 [..., V]."""
        return (x @ self.a @ self.b).float() + self.bias.float()


def low_rank_heads(config: FlexOlmoJaxConfig, ranks: list[int] | None) -> nn.ModuleDict:
    """The heads by the numbers of their experts, of those whose rank is not 0."""
    return nn.ModuleDict(
        {
            str(number): LowRankHead(config.hidden_size, rank, config.vocab_size)
            for number, rank in enumerate(ranks or [])
            if rank
        }
    )


def route(logits: torch.Tensor, config: FlexOlmoJaxConfig) -> torch.Tensor:
    """Weights of the experts for each token, 0 of those that are not chosen; float32 [B, S, E]."""
    weights, chosen = logits.softmax(dim=-1).topk(config.num_experts_per_tok, dim=-1)
    if config.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, chosen, weights)


def decayed_sums(values: torch.Tensor, slots: torch.Tensor, decay: float, weight: float):
    """values[t] + weight * sum over s < t of decay^(t - s) values[s], for the slots t.

    Args:
      values: float32 [B, T, E], 0 for padding.
      slots: [S].
    """
    distance = slots[:, None] - torch.arange(values.shape[1], device=values.device)
    factors = weight * decay ** distance.clamp(min=0).float()
    factors = torch.where(distance == 0, 1.0, torch.where(distance > 0, factors, 0.0))
    return torch.einsum("st,bte->bse", factors, values)


def _extra_layer(cache: Cache, index: int):
    """A layer of the cache after those of the network, made at its first use."""
    layers = cache.layers
    first = layers[0] if layers else None
    while len(layers) <= index:
        if isinstance(first, StaticLayer):
            layers.append(StaticLayer(first.max_cache_len))
        else:
            layers.append(DynamicLayer())
    return layers[index]


def _remember(cache: Cache | None, index: int, values: torch.Tensor) -> torch.Tensor:
    """Puts values [B, S, N] of new tokens into an extra layer; returns those of all [B, T, N]."""
    if cache is None:
        return values
    _extra_layer(cache, index)
    keys = values[:, None]  # as of one head
    return cache.update(keys, keys[..., :1], index)[0][:, 0]


def is_real(mask: torch.Tensor | None, tokens: torch.Tensor, seen: int) -> torch.Tensor:
    """Whether new tokens are text, not padding: bool [B, S].

    Args:
      mask: [B, T]; or [B, 1, S, T], as `generate` makes it for a static cache, bool or added to the
        scores: there, padding is what the last token does not see.
      seen: how many tokens were before.
    """
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if mask.ndim == 4:
        mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
    return mask[:, seen : seen + tokens.shape[1]].bool()


def check_one_text_per_row(
    position_ids: torch.Tensor | None, real: torch.Tensor, others: dict
) -> None:
    """Raises ValueError where rows hold several texts, or keys lie in a cache of another kind.

    Args:
      position_ids: [B, S] or [1, S].
      real: as `is_real` returns it.
      others: further arguments of the forward pass.
    """
    packed = {"cache", "cu_seq_lens_q"} & others.keys()  # as continuous batching passes them
    if position_ids is not None:
        again = position_ids[:, 1:] <= position_ids[:, :-1]
        packed |= {"position_ids"} if bool((again & real[:, 1:] & real[:, :-1]).any()) else set()
    if packed:
        raise ValueError(
            f"expected one text in each row, and its cache in past_key_values, found "
            f"{', '.join(sorted(packed))}: routing reads all earlier tokens of a text, so packed "
            "texts and continuous batching (generate_batch) cannot be used"
        )


class MixtureOfExperts(nn.Module):
    """The weighted sum of the experts' feed-forward networks; of one layer."""

    def __init__(self, config: FlexOlmoJaxConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.index = config.num_hidden_layers + layer_idx  # of the memory in the cache
        self.gate = Router(config)
        self.experts = nn.ModuleList(Olmo2MLP(config) for _ in range(config.num_experts))

    def weights(self, x: torch.Tensor, real: torch.Tensor, slots: torch.Tensor, cache):
        """By the rows of the router, and by those of earlier tokens where there is a memory."""
        logits = self.gate(x)
        if (memory := self.config.memory) is not None:
            known = _remember(cache, self.index, logits.masked_fill(~real[..., None], 0.0))
            logits = decayed_sums(known, slots, memory["decay"], memory["weight"])
        return route(logits, self.config)

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            used = weights[..., number] > 0
            weight = weights[..., number][used][:, None].to(x.dtype)
            out[used] = out[used] + weight * expert(x[used])
        return out


class DecoderLayer(nn.Module):
    """x = x + norm(attention(x)); x = x + norm(experts(x))."""

    def __init__(self, config: FlexOlmoJaxConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Olmo2Attention(config, layer_idx)
        self.mlp = MixtureOfExperts(config, layer_idx)
        self.post_attention_layernorm = Olmo2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = Olmo2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, weights, real, slots, cache, **attention):
        """Returns the residual stream and the weights of the experts.

        Args:
          weights: of evidence routing; None: by the router.
        """
        out, _ = self.self_attn(x, past_key_values=cache, **attention)
        x = x + self.post_attention_layernorm(out)
        if weights is None:
            weights = self.mlp.weights(x, real, slots, cache)
        return x + self.post_feedforward_layernorm(self.mlp(x, weights)), weights


class FlexOlmoJaxPreTrainedModel(Olmo2PreTrainedModel):
    config_class = FlexOlmoJaxConfig
    config: FlexOlmoJaxConfig
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    supports_gradient_checkpointing = False
    _can_compile_fullgraph = False  # experts that no token uses are not computed
    _can_record_outputs: dict = {}  # noqa: RUF012

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Router | LowRankHead):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=self.config.initializer_range)


class FlexOlmoJaxModel(FlexOlmoJaxPreTrainedModel):
    """The network up to its last norm."""

    def __init__(self, config: FlexOlmoJaxConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = Olmo2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Olmo2RotaryEmbedding(config=config)
        self.post_init()

    def forward(self, tokens, attention_mask, position_ids, cache, weights, real, seen):
        """Hidden states [B, S, D], and the weights of the last layer's experts [B, S, E]."""
        x = self.embed_tokens(tokens)
        slots = torch.arange(tokens.shape[1], device=x.device) + seen
        if position_ids is None:
            position_ids = slots[None]
        attention = {
            "position_embeddings": self.rotary_emb(x, position_ids),
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=position_ids,
            ),
        }
        own = weights
        for layer in self.layers:
            x, own = layer(x, weights, real, slots, cache, **attention)
        return self.norm(x), own


class FlexOlmoJaxForCausalLM(FlexOlmoJaxPreTrainedModel, GenerationMixin):
    """Next-token logits of the mixture."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: FlexOlmoJaxConfig):
        super().__init__(config)
        self.model = FlexOlmoJaxModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.heads = low_rank_heads(config, config.head_ranks)
        self.evidence = low_rank_heads(config, config.evidence_ranks)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("expected input_ids, and no inputs_embeds: routing reads the tokens")
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        seen = 0 if cache is None else int(cache.get_seq_length())
        real = is_real(attention_mask, input_ids, seen)
        check_one_text_per_row(position_ids, real, kwargs)
        weights = None
        if self.config.evidence is not None:
            weights = self.weights_by_evidence(input_ids, real, cache, seen)
        hidden, weights = self.model(
            input_ids, attention_mask, position_ids, cache, weights, real, seen
        )
        last = isinstance(logits_to_keep, int)
        keep = slice(-logits_to_keep, None) if last else logits_to_keep
        logits = self.logits(hidden[:, keep], weights[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return MoeCausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def logits(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Of the model's head, and of the experts' own, each by the weight of its expert."""
        logits = self.lm_head(hidden).float()
        for number, head in self.heads.items():
            weight = weights[..., int(number), None]
            logits = logits + torch.where(weight > 0, weight * head(hidden), 0.0)
        return logits

    def weights_by_evidence(self, tokens, real, cache, seen: int) -> torch.Tensor:
        """Experts are weighed by how well each predicted the tokens that were read: [B, S, E].

        The logit of an expert is strength * sum over s <= t of decay^(t - s) * (log p_e(x_s |
        x_s-1) - log p_0(x_s | x_s-1)), minus its shift; p_e is its bigram model.
        """
        evidence = self.config.evidence or {}
        index = self.config.num_hidden_layers
        marked = torch.where(real, tokens, -1)  # padding is no token
        last = torch.full_like(tokens[:, :1], -1)
        if seen:
            last = _extra_layer(cache, index).keys[:, 0, seen - 1, -1:].to(tokens.dtype)
        previous = torch.cat([last, marked[:, :-1]], dim=1)
        scores = torch.cat(
            [
                self._log_probabilities(*(x[:, i : i + CHUNK] for x in (previous, tokens)))
                for i in range(0, tokens.shape[1], CHUNK)
            ],
            dim=1,
        )
        follows = (real & (previous >= 0))[..., None]
        ratios = torch.where(follows, scores - scores[..., :1], 0.0)
        # Numbers of tokens are exact in float32 up to 2^24.
        known = _remember(cache, index, torch.cat([ratios, marked[..., None].float()], dim=-1))
        slots = torch.arange(tokens.shape[1], device=tokens.device) + seen
        sums = decayed_sums(known[..., :-1], slots, evidence["decay"], 1.0)
        shifts = torch.tensor(evidence["shifts"], device=sums.device)
        return route(evidence["strength"] * sums - shifts, self.config)

    def _log_probabilities(self, previous: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """log p_e(token | the token before) of every expert's bigram model: float32 [B, S, E]."""
        hidden = self.model.norm(self.model.embed_tokens(previous.clamp(min=0)))
        public = self.lm_head(hidden).float()
        scores = []
        for head in self.evidence.values():
            logits = public + head(hidden)
            chosen = logits.gather(-1, tokens[..., None])[..., 0]
            scores.append(chosen - logits.logsumexp(dim=-1))
        return torch.stack(scores, dim=-1)


FlexOlmoJaxConfig.register_for_auto_class()
FlexOlmoJaxForCausalLM.register_for_auto_class("AutoModelForCausalLM")
