"""The network: its sizes, and how it is computed."""

import dataclasses
from typing import Any, Literal, get_args

# Fields that do not change the architecture, only how it is computed.
COMPUTE = ("dtype", "expert_compute", "attention", "loss_chunk", "remat", "unroll")
MEMORY = (0.8, 0.3)  # default decay and weight of a merged model's router memory
EVIDENCE = (0.9, 0.5, 1.5)  # default decay, strength and shift of a merged model's evidence routing


def require(ok: bool, message: str) -> None:
    """Raises ValueError with a message unless `ok`."""
    if not ok:
        raise ValueError(message)


def choices(config: Any, name: str) -> tuple[Any, ...]:
    """The values that a Literal field of a config, or of its class, allows."""
    return get_args(next(f.type for f in dataclasses.fields(config) if f.name == name))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of the network (OLMo 2 layers, FlexOlmo mixture).

    The fields before `dtype` define the shapes and the mathematics, and are part of an anchor's
    identity; those from `dtype` on only define how the network is computed.

    Examples:
      >>> import flexolmo_jax as fo
      >>> config = fo.ModelConfig(vocab_size=512, width=32, num_layers=2, num_heads=2, ffn_width=48)
      >>> config.head_size
      16
      >>> config.replace(num_heads=3)
      Traceback (most recent call last):
      ValueError: num_heads must divide width, ...
    """

    vocab_size: int
    width: int  # D
    num_layers: int  # L
    num_heads: int  # N
    ffn_width: int  # F
    num_kv_heads: int | None = None  # None: num_heads; `kv_heads` resolves it
    head_width: int | None = None  # None: width / num_heads; `head_size` resolves it
    num_experts: int = 1  # E; the anchor alone has one
    active_experts: int | None = None  # A; None: all
    renormalize: bool = False  # scale the weights of the active experts to sum to 1
    # (decay, weight) of earlier tokens in a merged model's routing (modeling/router.py); set when
    # merging, like active_experts.
    memory: tuple[float, float] | None = None
    # (decay, strength, shift) of evidence routing (modeling/evidence.py), which takes the place of
    # router rows; set when merging too.
    evidence: tuple[float, float, float] | None = None
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    max_length: int = 4096  # the longest sequence that the model supports
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations
    expert_compute: Literal["dense", "grouped"] = "dense"  # all experts, or routed tokens only
    attention: Literal["auto", "blocked", "splash", "cudnn"] = "auto"  # see modeling/kernels
    loss_chunk: int = 128  # positions per sequence whose logits are in memory at the same time
    # Rematerialization policy: none; all but matmul outputs; also FFN-wide matmuls; full layer.
    remat: Literal["none", "matmuls", "wide_matmuls", "layer"] = "none"
    unroll: int = 1  # layers per iteration of the scan: more are faster on CPU, but compile longer

    def __post_init__(self):
        for name in ("vocab_size", "width", "num_layers", "num_heads", "ffn_width", "max_length"):
            found = getattr(self, name)
            require(found > 0, f"{name} must be positive, found {found}")
        for name in ("num_kv_heads", "head_width"):
            found = getattr(self, name)
            require(found is None or found > 0, f"{name} must be positive, found {found}")
        require(
            self.head_width is not None or self.width % self.num_heads == 0,
            f"num_heads must divide width, found width={self.width} and "
            f"num_heads={self.num_heads}: choose another number of heads, or set head_width",
        )
        require(
            self.num_heads % self.kv_heads == 0,
            f"num_kv_heads must divide num_heads, found num_heads={self.num_heads} and "
            f"num_kv_heads={self.kv_heads}",
        )
        require(
            self.head_size % 2 == 0,
            f"head_width must be even for rotary positions, found {self.head_size}",
        )
        require(self.num_experts >= 1, f"num_experts must be at least 1, found {self.num_experts}")
        require(
            self.active_experts is None or self.active_experts >= 1,
            f"active_experts must be at least 1, found {self.active_experts}",
        )
        if self.memory is not None:
            check_memory(*self.memory)
        if self.evidence is not None:
            check_evidence(*self.evidence)
            require(self.memory is None, "memory is of router rows: with evidence, leave it out")
        for name in ("dtype", "expert_compute", "attention", "remat"):
            known, found = choices(self, name), getattr(self, name)
            require(found in known, f"{name} must be one of {', '.join(known)}, found {found!r}")

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
        """From a manifest. Raises ValueError, naming `where`, if the fields are unknown."""
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{where}: not a model config of this version ({error})") from error

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    def architecture(self) -> dict[str, Any]:
        """The fields that two models must share to exchange experts, as JSON values."""
        values = dataclasses.asdict(self)
        values |= {"num_kv_heads": self.kv_heads, "head_width": self.head_size}
        for name in (*COMPUTE, "num_experts", "active_experts", "memory", "evidence", "max_length"):
            del values[name]
        return values


def check_memory(decay: float, weight: float) -> None:
    """Raises ValueError if the values are out of range."""
    require(
        0 < decay < 1 and 0 < weight < float("inf"),
        f"memory must be a decay in (0, 1) and a weight above 0, found {decay} and {weight}; for a "
        "router without memory, pass memory=None, or --no-memory",
    )


def check_evidence(decay: float, strength: float, shift: float) -> None:
    """Raises ValueError if the values are out of range."""
    require(
        0 < decay < 1 and 0 < strength < float("inf") and 0 <= shift < float("inf"),
        "evidence must be a decay in (0, 1), a strength above 0 and a shift of 0 or more, found "
        f"{decay}, {strength} and {shift}; to route by rows, pass evidence=None, or --no-evidence",
    )
