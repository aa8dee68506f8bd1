"""The PyTorch baseline of each case: `transformers` FlexOlmo, set up as well as we know how.

Its experts have several implementations; the benchmark runs two of them and compares with the
faster ("batched_mm" was five times slower on CPU). For an owner's training, the packed parameters
of the experts are unpacked, so that one expert can be frozen: otherwise PyTorch would compute the
gradients of the frozen expert, and discard them.
"""

import tempfile
from collections.abc import Callable

import torch
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM, Olmo2Config, Olmo2ForCausalLM
from transformers.models.flex_olmo import modeling_flex_olmo

from benchmarks.cases import Run
from benchmarks.sizes import Size
from flexolmo_jax.config import ModelConfig

torch.manual_seed(0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_default_device(DEVICE)


class Unpacked(torch.nn.Module):
    """A packed parameter [E, ...] as E parameters, indexed in the same way."""

    def __init__(self, packed: torch.Tensor):
        super().__init__()
        self.experts = torch.nn.ParameterList(
            torch.nn.Parameter(expert.clone()) for expert in packed
        )

    def __getitem__(self, index) -> torch.Tensor:
        return self.experts[int(index)]


def matrix_product(size: Size) -> Run:
    """A product of two large square matrices."""
    a, b = (torch.randn(size.gemm, size.gemm, dtype=_dtype(size.config)) for _ in range(2))
    return lambda: torch.mm(a, b)


def matrix_vector_product(size: Size) -> Run:
    """A product of a large matrix and a vector."""
    matrix, vector = torch.randn(size.stream, size.stream), torch.randn(size.stream)
    return lambda: torch.mv(matrix, vector)


def anchor_step(size: Size) -> Run:
    """A training step of the dense model."""
    config = Olmo2Config(**_shared(size.config))
    model = Olmo2ForCausalLM._from_config(
        config, dtype=_dtype(size.config), attn_implementation="sdpa"
    )
    return _step(model, size, lambda name: True)


def expert_step(size: Size, implementation: str) -> Run:
    """A training step of an owner's expert beside the frozen public one."""
    model = _flex_olmo(size.pair(), implementation)
    if implementation != "eager":
        return _step(model, size, lambda name: ".experts." in name)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            packed = getattr(experts, name).detach()
            delattr(experts, name)
            setattr(experts, name, Unpacked(packed))
    return _step(model, size, lambda name: name.endswith("_proj.experts.1"))


def merged_forward(size: Size, implementation: str, with_head: bool = True) -> Run:
    """Logits of the merged model; without the head, its final hidden states."""
    model = _flex_olmo(size.merged(), implementation).eval()
    tokens = _tokens(size)
    if not with_head:
        return torch.inference_mode()(lambda: model.model(tokens).last_hidden_state)
    return torch.inference_mode()(lambda: model(tokens).logits)


def generate(size: Size, batch: int, implementation: str, cache: str | None = None) -> Run:
    """Greedy generation by the merged model.

    Args:
      size: of the model and the work.
      batch: sequences.
      implementation: of the experts.
      cache: "static" is compiled on a GPU; None is the default, a cache that grows.
    """
    model = _flex_olmo(size.merged(), implementation).eval()
    prompt = torch.randint(0, size.config.vocab_size, (batch, size.prompt))
    exact = {"min_new_tokens": size.new_tokens, "max_new_tokens": size.new_tokens}
    return torch.inference_mode()(
        lambda: model.generate(
            prompt, do_sample=False, use_cache=True, cache_implementation=cache, **exact
        )
    )


def requests(
    size: Size, lengths: list[tuple[int, int]], at_a_time: int, implementation: str
) -> Run:
    """Greedy generation for requests of different lengths, in batches padded on the left."""
    model = _flex_olmo(size.merged(), implementation).eval()
    prompts = [torch.randint(1, size.config.vocab_size, (length,)) for length, _ in lengths]

    def run():
        for first in range(0, len(prompts), at_a_time):
            own = prompts[first : first + at_a_time]
            longest = max(map(len, own))
            padded = torch.zeros(len(own), longest, dtype=torch.long)
            mask = torch.zeros_like(padded)
            for row, prompt in enumerate(own):
                padded[row, longest - len(prompt) :] = prompt
                mask[row, longest - len(prompt) :] = 1
            new = max(new for _, new in lengths[first : first + at_a_time])
            model.generate(
                padded, attention_mask=mask, do_sample=False, use_cache=True,
                min_new_tokens=new, max_new_tokens=new,
            )  # fmt: skip

    return torch.inference_mode()(run)


def moe_layer(size: Size, experts: int, active: int, implementation: str) -> Run:
    """Forward and backward of one mixture of experts, all experts trained."""
    config = _config(size.config.replace(num_experts=experts, active_experts=active))
    config._experts_implementation = implementation
    layer = modeling_flex_olmo.FlexOlmoSparseMoeBlock(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(1, size.tokens, size.config.width, requires_grad=True)

    def run():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).sum().backward()

    return run


def loss(size: Size, vocabulary: int) -> Run:
    """The loss and its gradient to the hidden states."""
    hidden = torch.randn(size.batch * size.length, size.config.width, requires_grad=True)
    head = torch.randn(vocabulary, size.config.width)
    targets = torch.randint(0, vocabulary, (len(hidden),))

    def run():
        hidden.grad = None
        torch.nn.functional.cross_entropy(hidden @ head.T, targets).backward()

    return run


def load(size: Size, implementation: str) -> Run:
    """Loads a saved merged model."""
    folder = tempfile.mkdtemp()
    _flex_olmo(size.merged(), implementation).save_pretrained(folder)
    return lambda: FlexOlmoForCausalLM.from_pretrained(folder)


def write_model(folder: str, size: Size) -> None:
    """Writes a merged model of random weights, without its tokenizer."""
    _flex_olmo(size.merged(), "grouped_mm").save_pretrained(folder)


def _config(config: ModelConfig) -> FlexOlmoConfig:
    return FlexOlmoConfig(
        num_experts=config.num_experts,
        num_experts_per_tok=config.active_experts or config.num_experts,
        **_shared(config),
    )


def _shared(config: ModelConfig) -> dict:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_length,
        "pad_token_id": None,
        "eos_token_id": None,
        "bos_token_id": None,
    }


def _flex_olmo(config: ModelConfig, implementation: str) -> FlexOlmoForCausalLM:
    return FlexOlmoForCausalLM._from_config(
        _config(config), dtype=_dtype(config), experts_implementation=implementation,
        attn_implementation="sdpa",
    )  # fmt: skip


def _dtype(config: ModelConfig) -> torch.dtype:
    """In bfloat16, PyTorch keeps the weights and AdamW's state in it too; ours are float32."""
    return getattr(torch, config.dtype)


def _tokens(size: Size) -> torch.Tensor:
    return torch.randint(0, size.config.vocab_size, (size.batch, size.length))


def _step(model, size: Size, trained: Callable[[str], bool]) -> Run:
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True
    )
    tokens = _tokens(size)

    def run():
        optimizer.zero_grad(set_to_none=True)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()

    return run
