"""Frozen dataclasses that check themselves; presets are values of them, in `configs/`."""

import dataclasses
import os
import runpy
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

COMPUTE = (
    "dtype",
    "expert_compute",
    "attention",
    "loss_chunk",
    "remat",
    "unroll",
)  # fields that change no number
MEMORY = (0.8, 0.3)  # decay and weight of a merged model's router memory, where none are chosen


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of the network (OLMo 2 layers, FlexOlmo mixture).

    The first group decides the shapes and the mathematics and is part of an anchor's identity; the
    second, from `dtype` on, only says how it is computed.
    """

    vocab_size: int
    width: int  # D
    num_layers: int  # L
    num_heads: int  # N
    ffn_width: int  # F
    num_kv_heads: int | None = None  # None: as many as num_heads; read it as `kv_heads`
    head_width: int | None = None  # None: width / num_heads; read it as `head_size`
    num_experts: int = 1  # E; the anchor alone is a model of one expert
    active_experts: int | None = None  # A; None means all
    renormalize: bool = False  # scale the weights of the active experts to sum to 1
    memory: tuple[float, float] | None = None  # (decay, weight): how a merged model's router counts
    # a document's earlier tokens in (modeling/router.py); chosen at merge, as active_experts
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    max_length: int = 4096  # the longest sequence the model was made for
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations
    expert_compute: Literal["dense", "grouped"] = "dense"  # all experts, or routed rows only
    attention: Literal["auto", "blocked", "splash", "cudnn"] = "auto"  # modeling/attend.py
    loss_chunk: int = 128  # positions of each sequence whose logits are held at a time
    remat: Literal["none", "products", "wide", "layer"] = "none"  # what backward computes again:
    # nothing; all but matrix products; also those that are wider than the model; each whole layer
    unroll: int = 1  # layers in one turn of the loop: more run faster on CPU, and compile longer

    def __post_init__(self):
        for name in ("vocab_size", "width", "num_layers", "num_heads", "ffn_width", "max_length"):
            found = getattr(self, name)
            _require(found > 0, f"{name} must be positive, found {found}")
        for name in ("num_kv_heads", "head_width"):
            found = getattr(self, name)
            _require(found is None or found > 0, f"{name} must be positive, found {found}")
        _require(
            self.head_width is not None or self.width % self.num_heads == 0,
            f"num_heads must divide width, found width={self.width} and "
            f"num_heads={self.num_heads}: choose another number of heads, or set head_width",
        )
        _require(
            self.num_heads % self.kv_heads == 0,
            f"num_kv_heads must divide num_heads, found num_heads={self.num_heads} and "
            f"num_kv_heads={self.kv_heads}",
        )
        _require(
            self.head_size % 2 == 0,
            f"head_width must be even for rotary positions, found {self.head_size}",
        )
        _require(self.num_experts >= 1, f"num_experts must be at least 1, found {self.num_experts}")
        _require(
            self.active_experts is None or self.active_experts >= 1,
            f"active_experts must be at least 1, found {self.active_experts}",
        )
        if self.memory is not None:
            check_memory(*self.memory)
        for name in ("dtype", "expert_compute", "attention", "remat"):
            known, found = _choices(self, name), getattr(self, name)
            _require(found in known, f"{name} must be one of {', '.join(known)}, found {found!r}")

    @property
    def kv_heads(self) -> int:
        """K, the number of key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """H, the width of a head."""
        return self.width // self.num_heads if self.head_width is None else self.head_width

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "ModelConfig":
        """From a manifest. Raises ValueError, naming `where`, if the fields are not ours."""
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{where}: not a model config of this version ({error})") from error

    def replace(self, **changes: Any) -> "ModelConfig":
        return dataclasses.replace(self, **changes)

    def architecture(self) -> dict[str, Any]:
        """What two models must agree on to share experts, as JSON values."""
        same = dataclasses.asdict(self)
        same |= {"num_kv_heads": self.kv_heads, "head_width": self.head_size}
        for name in (*COMPUTE, "num_experts", "active_experts", "memory", "max_length"):
            del same[name]
        return same


def _choices(config: Any, name: str) -> tuple[Any, ...]:
    """The values that a Literal field of a config, or of its class, may have."""
    return get_args(next(f.type for f in dataclasses.fields(config) if f.name == name))


def check_memory(decay: float, weight: float) -> None:
    """Raises ValueError if a router cannot remember so."""
    _require(
        0 < decay < 1 and 0 < weight < float("inf"),
        f"memory must be a decay in (0, 1) and a weight above 0, found {decay} and {weight}; for a "
        "router without memory, say so: memory=None, --no-memory",
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to 0 (the reference's recipe)."""

    learning_rate: float
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only
    clip_norm: float = 1.0

    def __post_init__(self):
        _require(
            self.learning_rate > 0, f"learning_rate must be positive, found {self.learning_rate}"
        )
        _require(
            self.learning_rate <= 1,
            f"learning_rate must be at most 1 (AdamW moves every weight by about as much in a "
            f"step), found {self.learning_rate}",
        )
        _require(
            self.warmup_steps >= 0, f"warmup_steps must be 0 or more, found {self.warmup_steps}"
        )
        for name in ("b1", "b2"):
            found = getattr(self, name)
            _require(0 <= found < 1, f"{name} must be in [0, 1), found {found}")
        for name in ("eps", "clip_norm"):
            found = getattr(self, name)
            _require(0 < found < float("inf"), f"{name} must be positive and finite, found {found}")
        _require(
            0 <= self.weight_decay < 1 / self.learning_rate,
            "weight_decay must be 0 or more, and below 1 / learning_rate, where a step would leave "
            f"nothing of a weight; found {self.weight_decay}",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How text becomes batches."""

    batch_size: int  # sequences a step
    length: int  # tokens a sequence (S)
    source: str | None = None  # where the text is, if no --data says so
    text_field: str = "text"  # of JSONL and Parquet rows
    group_field: str = "group"  # rows that share it stay on one side of the held-out split
    heldout: float = 0.05  # share of the documents that no training ever sees

    def __post_init__(self):
        _require(self.batch_size > 0, f"batch_size must be positive, found {self.batch_size}")
        _require(self.length > 1, f"length must be at least 2 tokens, found {self.length}")
        _require(0 <= self.heldout < 1, f"heldout must be in [0, 1), found {self.heldout}")
        for name in ("text_field", "group_field"):
            _require(getattr(self, name) != "", f"{name} must not be empty")

    def split(self) -> dict[str, Any]:
        """What a package says of its held-out split, so that others can score the same documents.

        Which documents are held out follows from this and from each document's group (its text,
        where it has none) alone; see `is_heldout` in data/sources.py.
        """
        return {"share": self.heldout, "group_field": self.group_field}


@dataclasses.dataclass(frozen=True)
class Training:
    """What every stage has."""

    data: DataConfig
    optimizer: OptimizerConfig
    steps: int
    seed: int = 0
    licence: str = "unspecified"  # of the weights that come out
    contact: str = "unspecified"  # whom to ask, and to tell when the expert is to be taken out
    output_z_loss: float = 1e-5  # weight of mean(logsumexp(logits)^2)
    checkpoint_every: int = 1000  # steps
    log_every: int = 10  # steps
    expert_parallel: int = 1  # devices that a merged model's experts are spread over
    tensor_parallel: int = 1  # devices that share every layer's heads and hidden units
    parts: int = 1  # each device's share of a batch is worked on in so many; less memory
    remat: Literal["none", "products", "wide", "layer"] | None = None  # None: as the model has it
    expert_compute: Literal["dense", "grouped"] | None = None  # None: as the model has it

    def __post_init__(self):
        _require(self.steps > 0, f"steps must be positive, found {self.steps}")
        _require(0 <= self.seed < 2**63, f"seed must be 0 or more, found {self.seed}")
        _require(
            0 <= self.output_z_loss < float("inf"),
            f"output_z_loss must be 0 or more, and finite, found {self.output_z_loss}",
        )
        for name in ("log_every", "expert_parallel", "tensor_parallel", "parts"):
            found = getattr(self, name)
            _require(found > 0, f"{name} must be positive, found {found}")
        _require(
            self.checkpoint_every > 0,
            f"checkpoint_every must be positive, found {self.checkpoint_every}",
        )
        for name in ("remat", "expert_compute"):
            known = _choices(ModelConfig, name)
            found = getattr(self, name)
            _require(
                found is None or found in known,
                f"{name} must be one of {', '.join(known)}, found {found!r}",
            )

    def computing(self, model: ModelConfig) -> ModelConfig:
        """The model as this training computes it: the same numbers, up to rounding."""
        wanted = {"remat": self.remat, "expert_compute": self.expert_compute}
        return model.replace(**{name: value for name, value in wanted.items() if value})


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchorTraining(Training):
    """Stage 1: the public model, by the one who hosts it, on public text."""

    model: ModelConfig
    tokenizer: str | None = None  # a tokenizer.json; None trains a BPE of model.vocab_size
    separator: str = "<|endoftext|>"  # the token that opens every document
    public_tokens: int = 65_536  # how much public text goes into the anchor for owners to fit rows
    domain_embedding: str | None = None  # as in ExpertTraining; sets the public router row

    def __post_init__(self):
        super().__post_init__()
        _require(
            self.data.length <= self.model.max_length,
            f"data.length={self.data.length} is longer than model.max_length="
            f"{self.model.max_length}",
        )
        _require(
            self.model.memory is None,
            "model.memory is for merged models: choose it with `flexolmo merge --memory`",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertTraining(Training):
    """Stage 2: one owner's expert, by the owner alone, on closed text.

    `gating="alone"` fixes the expert's gate to 1 while it trains and then fits its router rows and
    biases against the anchor's public text (the default recipe), as `router` says: by logistic
    regression, or as the linear discriminant of two Gaussians of one covariance ("lda");
    `gating="pair"` is the paper's form: a softmax over the public and the new expert, rows learned
    jointly from the domain embedding.
    """

    gating: Literal["alone", "pair"] = "alone"
    router: Literal["logistic", "lda"] = "logistic"  # with "alone": how the rows are fitted
    router_z_loss: float = 0.0  # with gating="pair"
    domain_embedding: str | None = None  # with "pair": "wordllama", or a .npy of [D] or [N, D]
    fit_tokens: int = 32_768  # with "alone": tokens of each side that the rows are fitted on
    fit_prior: float = 0.3  # with "alone": share of text taken to be the owner's; less is humbler
    fit_ridge: float = 1e-3  # with "logistic": ridge penalty of the whitened rows

    def __post_init__(self):
        super().__post_init__()
        for name in ("gating", "router"):
            known, found = _choices(self, name), getattr(self, name)
            _require(
                found in known, f"{name} must be {' or '.join(map(repr, known))}, found {found!r}"
            )
        _require(
            self.gating == "alone" or self.router == "logistic",
            f"router={self.router!r} with gating='pair': the paper's form learns its rows; leave "
            "router out",
        )
        _require(0 < self.fit_prior < 1, f"fit_prior must be in (0, 1), found {self.fit_prior}")
        _require(
            self.gating != "alone" or self.fit_tokens >= self.data.length,
            f"fit_tokens must be at least data.length={self.data.length}, found {self.fit_tokens}",
        )
        _require(self.fit_ridge > 0, f"fit_ridge must be positive, found {self.fit_ridge}")


@dataclasses.dataclass(frozen=True)
class PrivacyConfig:
    """What a data owner asks of differentially private training; all else is calibrated.

    In this mode `data.batch_size` is the mean number of units in a step's batch. No key or seed is
    here: noise and batches come from the operating system's entropy.
    """

    epsilon: float  # of the whole run, router rows included
    delta: float | None = None  # None: the ledger's, or a tenth of a unit, at most 1e-5
    clip: float = 0.1  # C, the length that the gradient of a unit is clipped to
    unit: str = "document"  # or "sequence" (a window), or "group:FIELD" (a patient, an author)
    windows: int = 8  # most windows of a unit in a step; of a longer one, so many are drawn
    at_a_time: int = 8  # units whose gradients a device holds at the same time
    limit: float | None = None  # epsilon of all runs in the ledger; None: as it is, or `epsilon`

    def __post_init__(self):
        for name in ("epsilon", "clip", "limit"):
            found = getattr(self, name)
            ok = found is None or 0 < found < float("inf")
            _require(ok, f"{name} must be positive and finite, found {found}")
        _require(
            self.delta is None or 0 < self.delta < 1, f"delta must be in (0, 1), found {self.delta}"
        )
        _require(
            self.unit in ("document", "sequence")
            or (self.kind, bool(self.group_field)) == ("group", True),
            f"unit must be document, sequence or group:FIELD, found {self.unit!r}",
        )
        for name in ("windows", "at_a_time"):
            found = getattr(self, name)
            _require(found > 0, f"{name} must be positive, found {found}")

    @property
    def kind(self) -> str:
        """Of the units: document, sequence or group."""
        return self.unit.partition(":")[0]

    @property
    def group_field(self) -> str:
        """FIELD of group:FIELD; else empty."""
        return self.unit.partition(":")[2]

    def applied_to(self, config: ExpertTraining) -> ExpertTraining:
        """The config with FIELD as the group field, so that no group is held out in part."""
        if not self.group_field:
            return config
        data = dataclasses.replace(config.data, group_field=self.group_field)
        return dataclasses.replace(config, data=data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterTraining(Training):
    """Stage 3, optional: the merged model's router rows only, on proxies from public text."""

    router_z_loss: float = 0.001
    active_experts: int | None = None  # None: as the merged model says


def find_config(path: str | Path, folder: Path | None = None) -> Path:
    """The file of a config.

    A bare name (`demo_expert`) is always one that comes with flexolmo_jax: a file in the working
    folder that happens to be named so is not run. What ends in .py or has a slash is a file.

    Args:
      path: a Python file, or the name of a config that comes with flexolmo_jax.
      folder: where those that come with flexolmo_jax are; default: CONFIGS.

    Raises:
      ValueError: there is none.
    """
    file, folder, said = Path(path), folder or CONFIGS, str(path)
    bundled = folder / f"{file.stem}.py"
    is_bare = not isinstance(path, Path) and os.sep not in said
    if is_bare and not said.endswith(".py"):
        beside = [one for one in (f"{said}.py", said) if Path(one).is_file()]
        if bundled.is_file():
            if beside:
                warnings.warn(
                    f"{said}: this is the config that comes with flexolmo_jax, {bundled}; for the "
                    f"file in this folder, write ./{beside[0]}",
                    stacklevel=3,
                )
            return bundled
        if beside:
            raise ValueError(
                f"no config named {said}; for the file in this folder, write ./{beside[0]}"
            )
    elif file.is_file():
        return file
    elif is_bare and bundled.is_file():
        return bundled
    known = ", ".join(sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__"))
    raise ValueError(f"no config at {path}; give a Python file, or one of: {known}")


def load_config(path: str | Path, kind: type, folder: Path | None = None) -> Any:
    """Runs a config file and returns its `config`.

    Args:
      path, folder: as in `find_config`.
      kind: the class that `config` must be of.

    Raises:
      ValueError: the file is missing, fails, or holds a config of another stage.
    """
    file = find_config(path, folder)
    try:
        values = runpy.run_path(str(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    config = values.get("config")
    if not isinstance(config, kind):
        found = "none" if config is None else type(config).__name__
        raise ValueError(f"{file}: expected `config` to be {kind.__name__}, found {found}")
    return config


CONFIGS = Path(__file__).parent / "configs"
if not CONFIGS.exists():  # a source checkout: configs/ stands beside the package
    CONFIGS = Path(__file__).parent.parent / "configs"
