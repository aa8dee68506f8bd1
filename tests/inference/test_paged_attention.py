"""Attention to pages is attention to one cache, wherever the pages are and whoever had them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.inference import paged_attention
from flexolmo_jax.inference.paged_attention import MAX_GROUPS, PAGE, PageTable, pool_groups
from flexolmo_jax.modeling.attention import attend_to_segments
from flexolmo_jax.modeling.decode_state import KVCache

pytestmark = pytest.mark.usefixtures("optimized")

SLOTS, LENGTH = 5, 12 * PAGE
ENDS = (1, PAGE, 9 * PAGE + 1, 650, LENGTH)  # tokens of each sequence
WRITE, CLEAR, TOKENS, ATTEND = map(
    jax.jit,
    (
        paged_attention.write_segments,
        paged_attention.clear,
        paged_attention.write_tokens,
        paged_attention.attend_to_pages,
    ),
)


def config_of(heads, kv_heads):
    sizes = dict(vocab_size=300, width=8 * heads, num_layers=1, ffn_width=8)
    return ModelConfig(**sizes, num_heads=heads, num_kv_heads=kv_heads)


def in_pages(config, caches, order, ends, garbage):
    """Caches [1, K, LENGTH, H] in a pool full of `garbage`, placed in an order of their slots."""
    table = PageTable(SLOTS, LENGTH)
    empty = paged_attention.empty_pool(config, SLOTS, LENGTH)
    pool = jax.tree.map(lambda x: jnp.full_like(x, garbage), empty)
    for slot in order:  # the first blocks, and then the others
        table.extend(slot, 1)
    for slot in order:
        table.extend(slot, ends[slot])
    pages = table.pages()
    for slot in order:
        pool = WRITE(pool, (caches[slot],), pages, slot)
    return pool, pages


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1)])
@pytest.mark.parametrize("count", [1, 3])
def test_attention_is_that_to_one_cache_bit_for_bit_the_same_in_other_pages(heads, kv_heads, count):
    config, rng = config_of(heads, kv_heads), np.random.default_rng(0)
    width = config.head_size
    q = jnp.asarray(rng.standard_normal((SLOTS, count, heads, width)), jnp.float32)
    kv = rng.standard_normal((2, SLOTS, 1, kv_heads, LENGTH, width)).astype(np.float32)
    caches = [KVCache(*map(jnp.asarray, one)) for one in kv.swapaxes(0, 1)]
    starts = np.maximum(np.array(ENDS) - count, 0)
    positions = starts[:, None] + np.arange(count, dtype=np.int32)
    ends = positions[:, -1] + 1
    results = []
    for order, garbage in ((range(SLOTS), np.nan), ((3, 0, 4, 2, 1), 7.0)):
        pool, pages = in_pages(config, caches, order, ends, garbage)
        results.append(np.asarray(ATTEND(q, pool, positions, pages)))
    np.testing.assert_array_equal(*results)
    for slot, cache in enumerate(caches):
        alone = attend_to_segments(q[slot : slot + 1], (cache,), jnp.asarray(positions[[slot]]))
        np.testing.assert_allclose(results[0][[slot]], alone, atol=1e-6)


def test_new_tokens_are_in_cleared_pages_and_in_those_of_their_own_sequence():
    config, rng = config_of(2, 2), np.random.default_rng(0)
    empty = paged_attention.empty_pool(config, SLOTS, LENGTH)
    pool = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), empty)
    table, written = PageTable(SLOTS, LENGTH), []
    q = jnp.asarray(rng.standard_normal((SLOTS, 1, 2, config.head_size)), jnp.float32)
    for position in range(PAGE + 3):
        ends = np.full(SLOTS, position + 1)
        ends[1] = 0  # not in use
        new = table.resize(ends)
        assert (new is not None) == (position % PAGE == 0)
        pool = pool if new is None else CLEAR(pool, new)
        kv = rng.standard_normal((2, SLOTS, 1, 2, config.head_size)).astype(np.float32)
        positions = np.full((SLOTS, 1), position, np.int32)
        pages = table.pages()
        pool = TOKENS(pool, *kv, positions, pages)
        written.append(kv)
    found = ATTEND(q, pool, positions, pages)
    keys, values = np.concatenate(written, axis=2).swapaxes(2, 3)
    expected = attend_to_segments(q, (KVCache(*map(jnp.asarray, (keys, values))),), positions)
    used = np.arange(SLOTS) != 1
    np.testing.assert_allclose(found[used], expected[used], atol=1e-6)


def test_a_slot_gets_the_first_free_pages_and_gives_them_back():
    table = PageTable(3, 4 * PAGE)
    assert table.extend(0, 2 * PAGE) == [0, 1]
    assert table.extend(1, PAGE + 1) == [2, 3]
    assert table.extend(0, 2 * PAGE) == []
    table.free(0)
    assert table.extend(2, 3 * PAGE) == [0, 1, 4]
    pages = table.pages()
    assert pages.table[:, :3].tolist() == [[12, 12, 12], [2, 3, 12], [0, 1, 4]]
    assert pages.rows[:5].tolist() == [2, 2, 1, 1, 2]
    assert pages.blocks[:5].tolist() == [0, 1, 0, 1, 2]
    assert pages.is_used.tolist() == [True, True, False, False]
    assert table.resize(np.array([0, 2 * PAGE, 0])) is None
    assert sorted(table.extend(0, 4 * PAGE)) == [0, 1, 4, 5]


@pytest.mark.parametrize("length", [1, PAGE, 128, 768, 1024, 2048, 4096, 100_000])
def test_few_groups_of_pages_for_any_length(length):
    groups, pages = pool_groups(3, length)
    assert groups <= MAX_GROUPS and 3 * length <= groups * pages * PAGE
    assert (groups - 1) * pages * PAGE < 3 * (length + PAGE)
