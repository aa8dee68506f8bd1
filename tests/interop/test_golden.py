"""Logits of transformers, stored by make_golden.py: holds where torch is not installed."""

from pathlib import Path

import jax
import numpy as np
import pytest

from flexolmo_jax.interop import hf_import
from flexolmo_jax.modeling.transformer import forward

pytestmark = pytest.mark.usefixtures("optimized")

FOLDERS = sorted(p for p in (Path(__file__).parent / "golden").iterdir() if p.is_dir())


def test_there_are_models_of_both_kinds():
    names = [folder.name for folder in FOLDERS]
    assert sum(name.startswith("flex_olmo") for name in names) >= 2
    assert sum(name.startswith("olmo2") for name in names) >= 2


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_logits_are_those_of_transformers(folder):
    backbone, experts, config = hf_import.load(folder)
    with np.load(folder / "expected.npz") as file:
        expected = {name: file[name] for name in file.files}
    real = expected["attention_mask"] > 0

    @jax.jit
    def logits(backbone, experts, tokens, segments):
        out = forward(backbone, (experts,), tokens, config, segments=segments)
        return backbone.logits(out.hidden, config)

    found = logits(backbone, experts, expected["tokens"], real.astype(np.int32))
    largest = np.abs(expected["logits"][real]).max()
    difference = np.abs(found - expected["logits"])[real].max()
    assert difference <= 1e-5 * largest, difference / largest
