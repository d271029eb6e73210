"""STAM and STAMLite against the recordings of the STAM repository, version 0.1.0."""

import numpy as np
import pytest

import bounds
from chainrule import chains
from tests.golden.replay import assert_follows, cases, columns, recording, replay


def stam(spec):
    """The repository's behaviour: no debiasing of the residual EMAs, eps in the bias corrections, no clamp."""
    return chains.stam(
        spec["learning_rate"],
        spec["b1_base"],
        spec["b2"],
        eps=spec["eps"],
        weight_decay=None if spec["params_none"] else spec["weight_decay"],
        adapt_strength=spec["adapt_strength"],
        tau_decay=spec["tau_decay"],
        fallback_threshold=spec["fallback_threshold"],
        preset="original",
    )


def stam_lite(spec):
    """The repository's behaviour: eps in the bias corrections, scalars in `state_dtype`, no clamp."""
    return chains.stam_lite(
        spec["learning_rate"],
        spec["b1_base"],
        eps=spec["eps"],
        weight_decay=None if spec["params_none"] else spec["weight_decay"],
        adapt_strength=spec["adapt_strength"],
        moment_decay=spec["moment_decay"],
        b1_update_interval=spec["beta1_update_interval"],
        state_dtype=spec.get("state_dtype"),
        preset="original",
    )


BUILDERS = {"STAM": stam, "STAMLite": stam_lite}
FILES = ("stam_big", "stam_edge", "stam_open", "stam_real", "stamlite_edge", "stamlite_open")
LOGS = {
    "STAM": {"beta1": "b1", "b1_prod": "b1_prod", "tau": "first", "sigma_sq": "second"},
    "STAMLite": {
        "beta1": "b1",
        "b1_prod": "b1_prod",
        "grad_mean": "first",
        "grad_sq_mean": "second",
    },
}


def adaptive_state(state):
    return state.inner_state[0]


@pytest.mark.parametrize("case", cases(FILES))
def test_follows(case):
    rec, variant = recording(case.recording), case.variant
    spec = rec.variants[variant]
    run = replay(
        BUILDERS[spec["algo"]](spec),
        rec.params,
        rec.gradients(variant),
        log=adaptive_state,
        give_params=not spec["params_none"],
    )
    assert_follows(run.params, rec, variant)
    # A scalar that is kept in half precision may fall on either side of a tie.
    kept = bounds.gamma(3, "bfloat16") if "state_dtype" in spec else 0.0
    bound = bounds.RECORDED_STATISTIC + kept
    for name, field in LOGS[spec["algo"]].items():
        got = columns(getattr(run.logs, field).tree(), rec.names).astype(np.float64)
        np.testing.assert_allclose(got, rec.log(variant, name), rtol=bound, atol=0, err_msg=name)
