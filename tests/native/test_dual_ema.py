"""`scale_by_dual_ema(kernel="native")` is `kernel="xla"` within float32 rounding, in every form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chainrule import chains
from chainrule.transforms import quantized_state, scale_by_dual_ema

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


@pytest.mark.parametrize("kernel", ["native", "auto"])
@pytest.mark.parametrize("smaller", ["keep", "quantize"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["short", "long", "blend", "undivided", "from the gradient"])
def test_codes_are_stepped_as_decoded_state_is(form, bits, smaller, kernel):
    def held(kernel):
        inner = scale_by_dual_ema(kernel=kernel, **FORMS[form])
        return quantized_state(inner, bits, 16, fields=("mu", "mu_long"), smaller=smaller)

    native, plain = held(kernel), held("xla")
    state = native.init(tree(0))
    program = jax.jit(native.update).lower(tree(1), state).as_text()
    assert "chainrule_tier2_quantized" in program and "round" not in program
    for t in range(4):
        grads = tree(t + 1)
        v, other = jax.jit(plain.update)(grads, state)
        u, state = jax.jit(native.update)(grads, state)
        assert_close(u, v, 1e-4, 1e-5)
        # A value between two codes may fall on either side.
        for mine, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            if mine.dtype != jnp.uint8:
                assert_close(mine, theirs, 1e-5, 1e-7)
            else:
                differ = np.asarray(mine) != np.asarray(theirs)
                assert differ.sum() <= 0.01 * differ.size + 1


@pytest.mark.parametrize(
    "options", [{"rounding": "stochastic"}, {"fields": None}], ids=["stochastic", "nu too"]
)
def test_what_the_kernel_cannot_step_is_decoded(options):
    tx = quantized_state(
        scale_by_dual_ema(kernel="native"), block=16, **{"fields": ("mu",), **options}
    )
    jaxpr = str(jax.make_jaxpr(tx.update)(tree(1), tx.init(tree(0))))
    assert "chainrule_tier2_quantized" not in jaxpr


@pytest.mark.parametrize("kernel", ["native", "xla"])
def test_the_chain_takes_the_kernel_it_is_told(kernel):
    tx = chains.cosmic(0.1, kernel=kernel)
    params = tree(0)
    lowered = jax.jit(tx.update).lower(tree(1), tx.init(params), params)
    # All tensors are in tier 0 before the first retier: no tier 2, no call.
    assert "chainrule_tier2" not in lowered.as_text()
    atom = scale_by_dual_ema(kernel=kernel)
    lowered = jax.jit(atom.update).lower(tree(1), atom.init(params))
    assert ("chainrule_tier2" in lowered.as_text()) == (kernel == "native")
