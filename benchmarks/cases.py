"""The cases: who takes part in each, and how much work one run of it is."""

from typing import NamedTuple

from benchmarks.sizes import LAYERS, Size
from flexolmo_jax.modeling.flops import anchor_step_flops, expert_step_flops, forward_flops

OURS, PEER = "benchmarks.ours", "benchmarks.pytorch"
CASES = ("gemm", "stream", "expert_step", "expert_alone_step", "anchor_step", "merged_forward")
CASES += ("decode_1", "decode_8", "masks_8", *(f"moe_{e}_{a}" for e, a in LAYERS))
CASES += ("remat", "loss_100352", "load", "merge")
YARDSTICK = "the machine: "
PRODUCTS = "its products alone"
NUM_BYTES = {"ours, bfloat16": 2, "ours, int8": 1}  # of a weight; else 4


class Side(NamedTuple):
    """A contestant."""

    label: str
    module: str
    case: str
    option: str

    @property
    def is_peer(self) -> bool:
        return self.label.startswith(("transformers", "torch"))


def sides(case: str) -> list[Side]:
    """The contestants of a case; the machine's own rate, which limits it, is measured beside it."""
    eager = ("transformers, eager", PEER, "eager")
    peers = [eager, ("transformers, grouped_mm", PEER, "grouped_mm")]
    gemm = Side(f"{YARDSTICK}GEMM", OURS, "gemm", "")
    stream = Side(f"{YARDSTICK}matrix-vector product", OURS, "stream", "")
    limit = [gemm]
    if case in ("gemm", "stream"):
        found, limit = [("jax", OURS, ""), ("torch", PEER, "eager")], []
    elif case == "anchor_step":  # one expert: nothing to choose
        found = [("ours", OURS, ""), eager]
    elif case == "expert_alone_step":
        found = [("ours, gate fixed to 1", OURS, "")]
    elif case.startswith("moe_") or case == "merged_forward":
        found = [("ours, dense", OURS, "dense"), ("ours, grouped", OURS, "grouped"), *peers]
        if case.startswith("moe_"):
            found.append((PRODUCTS, OURS, "products"))
    elif case.startswith("decode_"):
        forms = [(f"ours, {form}", OURS, form) for form in ("float32", "bfloat16", "int8")]
        found, limit = [*forms, *peers], [stream]
    elif case == "masks_8":
        found = [("ours, all experts", OURS, "all"), ("ours, others off in each", OURS, "off")]
        limit = []
    elif case == "remat":
        found = [(f"ours, {policy}", OURS, policy) for policy in ("none", "matmuls", "layer")]
    elif case == "loss_100352":
        found = [("ours, 128 positions at a time", OURS, "chunks"), ("ours, all logits", OURS, "")]
        found += [("torch, cross_entropy", PEER, "eager")]
    elif case == "load":
        found = [("ours", OURS, "load"), ("plain read of the files", OURS, "read"), eager]
        limit = []
    elif case == "merge":
        found, limit = [("ours", OURS, "merge"), ("plain read of the files", OURS, "read")], []
    else:
        found = [("ours", OURS, ""), *peers, (PRODUCTS, OURS, "products")]
    return [Side(label, module, case, option) for label, module, option in found] + limit


def tokens(case: str, size: Size) -> int:
    """Tokens that one run of a case makes or reads; 0 where there are none."""
    if case in ("gemm", "stream", "load", "merge"):
        return 0
    if case.startswith(("decode_", "masks_")):
        return int(case.split("_")[1]) * size.new_tokens
    return size.tokens if case.startswith("moe_") else size.batch * size.length


def flops(case: str, size: Size) -> float:
    """FLOPs that one run needs; 0 where bytes are the limit."""
    config = size.config
    if case == "gemm":
        return 2.0 * size.gemm**3
    if case in ("expert_step", "expert_alone_step", "remat"):
        each = expert_step_flops(config, size.length)
    elif case == "anchor_step":
        each = anchor_step_flops(config, size.length)
    elif case == "merged_forward":
        each = forward_flops(config, size.length, size.active)
    elif case == "loss_100352":  # logits, and back to the hidden states; the head is frozen
        each = 4.0 * config.width * 100_352
    elif case.startswith("moe_"):  # forward, and back to inputs and weights
        each = 3 * 6.0 * config.width * config.ffn_width * int(case.split("_")[2])
    else:
        return 0.0
    return each * tokens(case, size)


def read_bytes(case: str, size: Size, label: str) -> float:
    """Bytes of weights and cache that one run has to read; 0 where FLOPs are the limit.

    Decoding reads at each step the projections, the head and the experts that any sequence uses:
    A for one sequence; for B of them, E (1 - (1 - A/E)^B) of E if each chooses at random; and the
    keys and values of what was there before, half of the new tokens on average.
    """
    if case == "stream":
        return 4.0 * size.stream**2
    if not case.startswith("decode_"):
        return 0.0
    c, batch = size.config, int(case.split("_")[1])
    used = size.experts * (1 - (1 - size.active / size.experts) ** batch)
    layer = 2 * c.width * c.head_size * (c.num_heads + c.kv_heads)
    layer += 3 * used * c.width * c.ffn_width
    weights = c.num_layers * layer + c.width * c.vocab_size
    cache = (
        2 * c.num_layers * batch * (size.prompt + size.new_tokens / 2) * c.kv_heads * c.head_size
    )
    of_cache = 2 if "bfloat16" in label else 4  # with int8, only weights are rounded
    return (NUM_BYTES.get(label, 4) * weights + of_cache * cache) * size.new_tokens
