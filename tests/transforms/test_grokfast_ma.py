"""The windowed filter of Grokfast."""

import jax.numpy as jnp
import numpy as np
import pytest

import bounds
from chainrule.transforms import grokfast_ma
from harness import assert_close
from reference.filters import grokfast_ma as reference


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("window_size", [1, 3, 7])
def test_the_window_slides(window_size, warmup):
    tx = grokfast_ma(window_size, lamb=2.0, warmup=warmup)
    oracle = reference(window_size, 2.0, warmup)
    gradients = np.random.default_rng(0).normal(size=(10, 4))
    state = tx.init(jnp.zeros(4))
    for g in gradients:
        updates, state = tx.update(jnp.asarray(g, jnp.float32), state)
        assert_close(updates, oracle({"": g}, {"": g})[""], bounds.summed(10))


def test_the_state_is_the_window():
    state = grokfast_ma(5).init({"w": jnp.zeros((2, 3), jnp.bfloat16)})
    assert (state.window["w"].shape, state.window["w"].dtype) == ((5, 2, 3), jnp.bfloat16)


def test_a_window_of_nothing_is_an_error():
    with pytest.raises(
        ValueError, match=r"grokfast_ma: `window_size` must be in \[1, inf\), got 0"
    ):
        grokfast_ma(0)
