"""Configs of the stages of training."""

import dataclasses
from typing import Any, Literal

from flexolmo_jax.config.model import ModelConfig, choices, require


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to 0 (the reference's recipe), or Muon.

    With `name="muon"`, the matrices of attention and feed-forward networks are trained by Muon, at
    `learning_rate`, and all else by AdamW, at `adamw_learning_rate`; b1, b2 and eps are AdamW's.

    Examples:
      >>> import flexolmo_jax as fo
      >>> fo.OptimizerConfig(learning_rate=3e-3, warmup_steps=30).weight_decay
      0.0
      >>> fo.OptimizerConfig(name="muon", learning_rate=1e-2, adamw_learning_rate=4e-3).name
      'muon'
    """

    learning_rate: float
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only
    clip_norm: float = 1.0
    name: Literal["adamw", "muon"] = "adamw"
    adamw_learning_rate: float | None = None  # with "muon"; None: learning_rate

    def __post_init__(self):
        known = choices(self, "name")
        require(
            self.name in known,
            f"name must be {' or '.join(map(repr, known))}, found {self.name!r}",
        )
        require(
            self.learning_rate > 0, f"learning_rate must be positive, found {self.learning_rate}"
        )
        require(
            self.learning_rate <= 1,
            f"learning_rate must be at most 1 (in a step, AdamW changes every weight by about "
            f"that much), found {self.learning_rate}",
        )
        require(
            self.warmup_steps >= 0, f"warmup_steps must be 0 or more, found {self.warmup_steps}"
        )
        for name in ("b1", "b2"):
            found = getattr(self, name)
            require(0 <= found < 1, f"{name} must be in [0, 1), found {found}")
        for name in ("eps", "clip_norm"):
            found = getattr(self, name)
            require(0 < found < float("inf"), f"{name} must be positive and finite, found {found}")
        other = self.adamw_learning_rate
        require(
            other is None or self.name == "muon",
            f"adamw_learning_rate={other} with name={self.name!r}: learning_rate is the rate of "
            "all weights; leave adamw_learning_rate out",
        )
        require(
            other is None or 0 < other <= 1,
            f"adamw_learning_rate must be positive, and at most 1, found {other}",
        )
        require(
            0 <= self.weight_decay < 1 / max(self.learning_rate, other or 0),
            "weight_decay must be 0 or more, and below 1 / learning_rate (there, one step would "
            f"set every weight to 0), found {self.weight_decay}",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How text becomes batches.

    Examples:
      >>> import flexolmo_jax as fo
      >>> fo.DataConfig(batch_size=8, length=128).heldout
      0.05
    """

    batch_size: int  # B, sequences per step
    length: int  # S, tokens per sequence
    source: str | None = None  # the text, if there is no --data
    text_field: str = "text"  # of JSONL and Parquet rows
    group_field: str = "group"  # rows with equal values stay on one side of the held-out split
    heldout: float = 0.05  # share of documents that are never trained on

    def __post_init__(self):
        require(self.batch_size > 0, f"batch_size must be positive, found {self.batch_size}")
        require(self.length > 1, f"length must be at least 2 tokens, found {self.length}")
        require(0 <= self.heldout < 1, f"heldout must be in [0, 1), found {self.heldout}")
        for name in ("text_field", "group_field"):
            require(getattr(self, name) != "", f"{name} must not be empty")

    def split(self) -> dict[str, Any]:
        """The held-out split as the manifest records it, so that others score the same documents.

        It depends only on these values and on each document's group (or its text, if it has no
        group); see `is_heldout` in data/sources.py.
        """
        return {"share": self.heldout, "group_field": self.group_field}


@dataclasses.dataclass(frozen=True)
class Training:
    """Fields of every stage."""

    data: DataConfig
    optimizer: OptimizerConfig
    steps: int
    seed: int = 0
    licence: str = "unspecified"  # of the trained weights
    contact: str = "unspecified"  # for questions, and for requests to remove the expert
    output_z_loss: float = 1e-5  # weight of mean(logsumexp(logits)^2)
    checkpoint_every: int = 1000  # steps
    log_every: int = 10  # steps
    expert_parallel: int = 1  # devices that a merged model's experts are sharded over
    tensor_parallel: int = 1  # devices that every layer's heads and hidden units are sharded over
    microbatches: int = 1  # gradient accumulation steps per device; more of them use less memory
    # None: as in the model config.
    remat: Literal["none", "matmuls", "wide_matmuls", "layer"] | None = None
    expert_compute: Literal["dense", "grouped"] | None = None  # None: as in the model config

    def __post_init__(self):
        require(self.steps > 0, f"steps must be positive, found {self.steps}")
        require(0 <= self.seed < 2**63, f"seed must be 0 or more, found {self.seed}")
        require(
            0 <= self.output_z_loss < float("inf"),
            f"output_z_loss must be 0 or more, and finite, found {self.output_z_loss}",
        )
        for name in ("log_every", "expert_parallel", "tensor_parallel", "microbatches"):
            found = getattr(self, name)
            require(found > 0, f"{name} must be positive, found {found}")
        require(
            self.checkpoint_every > 0,
            f"checkpoint_every must be positive, found {self.checkpoint_every}",
        )
        for name in ("remat", "expert_compute"):
            known = choices(ModelConfig, name)
            found = getattr(self, name)
            require(
                found is None or found in known,
                f"{name} must be one of {', '.join(known)}, found {found!r}",
            )

    def computing(self, model: ModelConfig) -> ModelConfig:
        """The model config with this training's way of computing; results agree up to rounding."""
        changes = {"remat": self.remat, "expert_compute": self.expert_compute}
        return model.replace(**{name: value for name, value in changes.items() if value})


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchorTraining(Training):
    """Stage 1: whoever hosts the public model trains it on public text.

    Examples:
      >>> import flexolmo_jax as fo
      >>> config = fo.AnchorTraining(
      ...     model=fo.ModelConfig(
      ...         vocab_size=512, width=32, num_layers=2, num_heads=2, ffn_width=48, max_length=64
      ...     ),
      ...     data=fo.DataConfig(batch_size=4, length=32),
      ...     optimizer=fo.OptimizerConfig(learning_rate=3e-3),
      ...     steps=100,
      ... )
      >>> config.separator
      '<|endoftext|>'
    """

    model: ModelConfig
    tokenizer: str | None = None  # a tokenizer.json; None: train a BPE of model.vocab_size
    separator: str = "<|endoftext|>"  # end-of-document token; every document starts with it
    public_tokens: int = 65_536  # public text in the anchor package, for owners to fit rows
    evidence_rank: int = 0  # of the public evidence head (modeling/evidence.py); 0: none
    domain_embedding: str | None = None  # as in ExpertTraining; sets the public router row

    def __post_init__(self):
        super().__post_init__()
        require(
            self.data.length <= self.model.max_length,
            f"data.length={self.data.length} is longer than model.max_length="
            f"{self.model.max_length}",
        )
        for name in ("memory", "evidence"):
            require(
                getattr(self.model, name) is None,
                f"model.{name} is for merged models: set it with `flexolmo merge --{name}`",
            )
        check_rank("evidence_rank", self.evidence_rank, self.model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertTraining(Training):
    """Stage 2: an owner trains its expert alone, on closed text.

    `gating="fixed"` (the default recipe) fixes the expert's gate to 1 during training, and then
    fits its router rows and biases against the anchor's public text. `router` selects logistic
    regression, or the linear discriminant of two Gaussians with equal covariance ("lda").
    `gating="softmax"` is the paper's recipe: a softmax over the public and the new expert, whose
    rows start from the domain embedding and are trained too.


    Examples:
      >>> import flexolmo_jax as fo
      >>> config = fo.ExpertTraining(
      ...     data=fo.DataConfig(batch_size=4, length=32),
      ...     optimizer=fo.OptimizerConfig(learning_rate=3e-3),
      ...     steps=100,
      ... )
      >>> config.router
      'logistic'
    """

    gating: Literal["fixed", "softmax"] = "fixed"
    router: Literal["logistic", "lda"] = "logistic"  # with "fixed": how the rows are fitted
    router_z_loss: float = 0.0  # with gating="softmax"
    domain_embedding: str | None = None  # with "softmax": "wordllama", or a .npy of [D] or [N, D]
    fit_tokens: int = 32_768  # with "fixed": own and public tokens each, to fit the rows on
    # With "fixed": prior probability that a token is the owner's; lower makes the expert fire
    # less often.
    fit_prior: float = 0.3
    fit_ridge: float = 1e-3  # with "logistic": ridge penalty of the whitened rows
    head_rank: int = 0  # of the expert's own delta of the output head; 0: none
    evidence_rank: int = 0  # of its evidence head, for evidence routing; 0: none
    ffn_rank: int = 0  # of its deltas of the public feed-forward matrices; 0: a full network

    def __post_init__(self):
        super().__post_init__()
        for name in ("gating", "router"):
            known, found = choices(self, name), getattr(self, name)
            require(
                found in known, f"{name} must be {' or '.join(map(repr, known))}, found {found!r}"
            )
        require(
            self.gating == "fixed" or self.router == "logistic",
            f"router={self.router!r} with gating='softmax': this recipe trains its rows; leave "
            "router out",
        )
        require(0 < self.fit_prior < 1, f"fit_prior must be in (0, 1), found {self.fit_prior}")
        require(
            self.gating != "fixed" or self.fit_tokens >= self.data.length,
            f"fit_tokens must be at least data.length={self.data.length}, found {self.fit_tokens}",
        )
        require(self.fit_ridge > 0, f"fit_ridge must be positive, found {self.fit_ridge}")
        for name in ("head_rank", "evidence_rank", "ffn_rank"):
            check_rank(name, getattr(self, name))


def check_rank(name: str, rank: int, model: ModelConfig | None = None) -> None:
    """Raises ValueError if a low-rank head or matrix cannot have this rank."""
    require(rank >= 0, f"{name} must be 0 or more, found {rank}")
    if model is not None:
        largest = min(model.width, model.ffn_width if name == "ffn_rank" else model.vocab_size)
        require(rank <= largest, f"{name} must be at most {largest}, the width, found {rank}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvidenceTraining(Training):
    """A public evidence head for an anchor that exists (modeling/evidence.py).

    Examples:
      >>> import flexolmo_jax as fo
      >>> config = fo.EvidenceTraining(
      ...     data=fo.DataConfig(batch_size=4, length=32),
      ...     optimizer=fo.OptimizerConfig(learning_rate=1e-2),
      ...     steps=100,
      ... )
      >>> config.evidence_rank
      64
    """

    evidence_rank: int = 64  # R
    public_tokens: int = 65_536  # public text in the package, if the anchor brings none

    def __post_init__(self):
        super().__post_init__()
        require(
            self.evidence_rank > 0, f"evidence_rank must be positive, found {self.evidence_rank}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterTraining(Training):
    """Stage 3, optional: tunes only the merged model's router rows, on proxies.

    Examples:
      >>> import flexolmo_jax as fo
      >>> config = fo.RouterTraining(
      ...     data=fo.DataConfig(batch_size=4, length=32),
      ...     optimizer=fo.OptimizerConfig(learning_rate=3e-3),
      ...     steps=100,
      ... )
      >>> config.active_experts is None  # as the merged model says
      True
    """

    router_z_loss: float = 0.001
    active_experts: int | None = None  # None: as in the merged model

    def __post_init__(self):
        super().__post_init__()
        require(
            self.optimizer.name != "muon",
            "optimizer.name='muon' is for matrices, and this stage trains router rows; use 'adamw'",
        )

    def computing(self, model: ModelConfig) -> ModelConfig:
        """As in `Training`, with this stage's number of active experts."""
        active = self.active_experts or model.active_experts
        return super().computing(model).replace(active_experts=active)
