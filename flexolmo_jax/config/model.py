"""The network: its sizes, and how it is computed."""

import dataclasses
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


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def choices(config: Any, name: str) -> tuple[Any, ...]:
    """The values that a Literal field of a config, or of its class, may have."""
    return get_args(next(f.type for f in dataclasses.fields(config) if f.name == name))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of the network (OLMo 2 layers, FlexOlmo mixture).

    The first group decides the shapes and the mathematics and is part of an anchor's identity; the
    second, from `dtype` on, only says how it is computed.

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
    remat: Literal["none", "matmuls", "wide_matmuls", "layer"] = (
        "none"  # what backward computes again:
    )
    # nothing; all but matrix products; also those that are wider than the model; each whole layer
    unroll: int = 1  # layers in one turn of the loop: more run faster on CPU, and compile longer

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


def check_memory(decay: float, weight: float) -> None:
    """Raises ValueError if a router cannot remember so."""
    require(
        0 < decay < 1 and 0 < weight < float("inf"),
        f"memory must be a decay in (0, 1) and a weight above 0, found {decay} and {weight}; for a "
        "router without memory, say so: memory=None, --no-memory",
    )
