"""`scale_by_dual_ema(kernel="native")` is `kernel="xla"` within float32 rounding, in every form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chainrule import chains
from chainrule.transforms import scale_by_dual_ema

FORMS = {
    "short": {},
    "long": {"blend": 0.0},
    "blend": {"blend": 0.25},
    "kept": {"keep_long": True},
    "undivided": {"b2": None},
    "from the gradient": {"start": "gradient", "blend": 0.5},
    "second moment corrected": {"debias": "second", "blend": 0.5},
    "state in bfloat16": {"state_dtype": jnp.bfloat16},
}
SHAPES = {"matrix": (33, 40), "none": (0,), "scalar": (), "vector": (7,)}


def tree(seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(scale * rng.standard_normal(s), jnp.float32) for k, s in SHAPES.items()}


def assert_close(tree, expected, rtol, atol):
    def check(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol, atol)

    jax.tree.map(check, tree, expected)


@pytest.mark.parametrize("form", FORMS)
def test_native_is_xla(form):
    native = scale_by_dual_ema(kernel="native", **FORMS[form])
    plain = scale_by_dual_ema(kernel="xla", **FORMS[form])
    mine, other = native.init(tree(0)), plain.init(tree(0))
    tolerance = 1e-2 if "bfloat16" in form else 1e-4
    for t in range(5):
        grads = tree(t + 1)
        u, mine = jax.jit(native.update)(grads, mine)
        v, other = jax.jit(plain.update)(grads, other)
        assert jax.tree.map(jnp.result_type, mine) == jax.tree.map(jnp.result_type, other)
        assert_close(u, v, tolerance, 1e-5)
        assert_close(mine, other, tolerance, 1e-6)


@pytest.mark.parametrize("kernel", ["native", "xla"])
def test_the_chain_takes_the_kernel_it_is_told(kernel):
    tx = chains.cosmic(0.1, kernel=kernel)
    params = tree(0)
    jaxpr = jax.make_jaxpr(tx.update)(tree(1), tx.init(params), params)
    # All tensors are in tier 0 before the first retier: no tier 2, no call.
    assert "chainrule_tier2" not in str(jaxpr)
    atom = scale_by_dual_ema(kernel=kernel)
    jaxpr = jax.make_jaxpr(atom.update)(tree(1), atom.init(params))
    assert ("chainrule_tier2" in str(jaxpr)) == (kernel == "native")
