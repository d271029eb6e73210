"""The recorded trajectories of KerasOptimizers through the bridge: variables by their paths, one `apply` a step."""

import keras
import numpy as np
import pytest
from tests.golden import test_adam, test_filters, test_muon
from tests.golden.replay import assert_follows, cases, recording

import bounds
import chainrule

pytestmark = pytest.mark.keras

FILES = ("keras_adam", "keras_muon", "keras_real", "keras_wrappers")
# All of them on JAX. To lower a chain to torch or TensorFlow takes seconds, most for Muon's 25 products a matrix: there
# one of Muon's recordings, with everything that Muon has in it, and all the others.
CASES = [
    case
    for case in cases(FILES)
    if keras.backend.backend() == "jax"
    or "muon" not in case.id
    or case.id == "keras_muon-caution_nadam_ratio"
]


def chain_of(rec, variant):
    """The chain that the tests of plain JAX hold to this recording."""
    spec = rec.variants[variant]
    if spec["algo"] in test_adam.BUILDERS:
        return test_adam.BUILDERS[spec["algo"]](spec["hp"])
    if spec["algo"] in test_muon.BUILDERS:
        return test_muon.BUILDERS[spec["algo"]](spec)
    return test_filters.BUILDERS[spec["algo"]](spec, rec)


@pytest.mark.parametrize("case", CASES)
def test_follows(case):
    rec, variant = recording(case.recording), case.variant
    spec = rec.variants[variant]
    paths = spec.get("paths", {name: name for name in rec.names})
    variables = []
    for name in rec.names:
        scope, _, last = paths[name].rpartition("/")
        with keras.name_scope(scope or None) if scope else keras.name_scope("recorded"):
            variables.append(keras.Variable(rec.params[name], name=last))
        assert variables[-1].path.endswith(paths[name])
    optimizer = chainrule.KerasBridge(chain_of(rec, variant))
    gradients, seen = rec.gradients(variant), {name: [] for name in rec.names}
    for t in range(rec.meta["T"]):
        optimizer.apply(
            [keras.ops.convert_to_tensor(gradients[n][t]) for n in rec.names], variables
        )
        for name, variable in zip(rec.names, variables, strict=True):
            seen[name].append(np.array(keras.ops.convert_to_numpy(variable)))
    one_element = tuple(name for name, p in rec.params.items() if p.size == 1)
    assert_follows(
        {name: np.stack(values) for name, values in seen.items()},
        rec,
        variant,
        tolerance=bounds.RECORDED_BF16 if spec.get("ns_dtype") == "bfloat16" else bounds.RECORDED,
        skip=one_element if "rtho" in spec["algo"] else (),
    )
