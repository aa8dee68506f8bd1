"""A random model under two adapters: lm-evaluation-harness's own for Hugging Face, and ours."""

import itertools
import json
import runpy
from pathlib import Path

import pytest

from flexolmo_jax.data.sources import read_documents
from flexolmo_jax.data.tokenizer import Tokenizer

MAKE_GOLDEN = Path(__file__).parents[1] / "interop" / "make_golden.py"


@pytest.fixture(scope="session", params=["opened", "plain"])
def folder(request, tmp_path_factory):
    """A random FlexOlmo of four experts in Hugging Face's form.

    Its tokenizer puts the separator in front of a text, as ours do, or does not, as OLMo's; it was
    made for 64 tokens, or, "long", for more than the 256 of some answers.
    """
    for package in ("torch", "transformers", "accelerate"):
        pytest.importorskip(package, reason="needs the extra `reference`")
    folder = tmp_path_factory.mktemp(request.param)
    documents = itertools.islice(read_documents("corpus:public"), 20)
    tokenizer = Tokenizer.train((document.text for document in documents), 300)
    saved = json.loads(tokenizer.json)
    if request.param != "opened":
        saved["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    special = dict.fromkeys(("bos_token", "eos_token"), tokenizer.separator_text)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.separator)
    make = runpy.run_path(str(MAKE_GOLDEN))["random_model"]
    make(
        "flex_olmo",
        11,
        vocab_size=304,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=320 if request.param == "long" else 64,
        **ids,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def theirs(folder):
    """The harness's own adapter, with this model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=1)
