"""`scale_by_dual_ema(kernel="native")` is `kernel="xla"` within float32 rounding, in every form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bounds
from chainrule import chains
from chainrule.transforms import quantized_state, scale_by_dual_ema
from harness import assert_close

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
# The kernel takes its decays in float32; nu's goes into the moments whole and into the direction by its root.
DECAYS = bounds.live(0.9) + bounds.live(0.999)
SHAPES = {"matrix": (33, 40), "none": (0,), "scalar": (), "vector": (7,)}


def tree(seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(scale * rng.standard_normal(s), jnp.float32) for k, s in SHAPES.items()}


@pytest.mark.parametrize("form", FORMS)
def test_native_is_xla(form):
    native = scale_by_dual_ema(kernel="native", **FORMS[form])
    plain = scale_by_dual_ema(kernel="xla", **FORMS[form])
    mine, other = native.init(tree(0)), plain.init(tree(0))
    for t in range(5):
        grads = tree(t + 1)
        u, mine = jax.jit(native.update)(grads, mine)
        v, other = jax.jit(plain.update)(grads, other)
        assert jax.tree.map(jnp.result_type, mine) == jax.tree.map(jnp.result_type, other)
        # A state in bfloat16 may fall on either side of a tie, and is then a unit apart.
        bound = bounds.stepped(t + 1) + DECAYS
        bound += bounds.gamma(3 * (t + 1), "bfloat16") if "bfloat16" in form else 0.0
        assert_close(u, v, bound)
        assert_close(mine, other, bound)


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
        assert_close(u, v, bounds.stepped(t + 1) + DECAYS)
        # A value between two codes may fall on either side.
        for mine, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            if mine.dtype != jnp.uint8:
                assert_close(mine, theirs, bounds.stepped(t + 1) + DECAYS)
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
