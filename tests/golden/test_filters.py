"""Gradient filters before SGD and Adam against the official Grokfast and OrthoGrad and KerasOptimizers' wrappers."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chainrule import chains
from chainrule.transforms import chain, grokfast_ma, orthograd, scale_by_adam
from tests.golden.replay import assert_follows, cases, recording, relative_error, replay


def torch_base(spec):
    """SGD, or AdamW where there is weight decay."""
    base = dict(spec["base"])
    lr, weight_decay = base.pop("lr"), base.pop("weight_decay", None)
    assert not base, base
    return optax.sgd(lr) if weight_decay is None else chains.adam(lr, weight_decay=weight_decay)


def official_ma(spec, inner):
    hp = dict(spec["hp"])
    assert hp.pop("filter_type", "mean") == "mean"
    return chain(grokfast_ma(**hp), inner)


def keras_base(spec, rec):
    """The wrapped optimizer as the wrapper runs it: its step count stands still at 1 and its weight decay is left out.

    Adam's bias corrections are then the constants 1 - b1 and 1 - b2: no debiasing, with another rate and eps.
    """
    lr = spec["hp"].get("learning_rate", float(rec.data.get("lr", 0.01)))
    if "base" not in spec or spec["base"] == "sgd":
        return optax.sgd(lr)
    if spec["base"] == "sgdmom":
        return optax.sgd(lr / 2, momentum=0.9)
    b1 = 0.9
    b2, eps, eps_is_raw = {"kadam": (0.999, 1e-7, True), "radam": (0.995, 1e-8, False)}[
        spec["base"]
    ]
    root = (1 - b2) ** 0.5
    return chain(
        scale_by_adam(b1, b2, eps if eps_is_raw else eps * root, debias=False),
        optax.scale_by_learning_rate(lr * root / (1 - b1)),
    )


def keras_grokfast(spec, rec):
    hp = spec["hp"]
    inner = keras_base(spec, rec)
    return chains.grokfast(inner, hp.get("alpha", 0.99), hp.get("lamb", 5.0), start="zero")


BUILDERS = {
    "official Grokfast EMA": lambda spec, rec: chains.grokfast(torch_base(spec), **spec["hp"]),
    "official Grokfast MA": lambda spec, rec: official_ma(spec, torch_base(spec)),
    "official OrthoGrad": lambda spec, rec: chains.orthograd(torch_base(spec)),
    "Grokfast_EMA": keras_grokfast,
    "grok_sgd": keras_grokfast,
    "Orthograd": lambda spec, rec: chains.orthograd(keras_base(spec, rec)),
    "ortho_sgd": lambda spec, rec: chains.orthograd(keras_base(spec, rec)),
}
FILES = ("canon_grok_ortho", "keras_wrappers", "keras_real")


def spec_of(case):
    return recording(case.recording).variants[case.variant]


def followed_here(case):
    spec = spec_of(case)
    return spec["algo"] in BUILDERS and not str(spec.get("base")).startswith("muon")


@pytest.mark.parametrize("case", [p for p in cases(FILES) if followed_here(p.values[0])])
def test_follows(case):
    rec, variant = recording(case.recording), case.variant
    spec = spec_of(case)
    run = replay(BUILDERS[spec["algo"]](spec, rec), rec.params, rec.gradients(variant))
    # The references blow the rounding residue of a one-element tensor up to its gradient's length.
    degenerate = tuple(name for name, p in rec.params.items() if p.size == 1)
    assert_follows(run.params, rec, variant, skip=degenerate if "rtho" in spec["algo"] else ())


UNITS = sorted(
    key.removeprefix("unit_out/")
    for key in recording("canon_grok_ortho").data
    if key.startswith("unit_out/")
)


@pytest.mark.parametrize("name", UNITS)
def test_single_projections(name):
    data = recording("canon_grok_ortho").data
    w, g = (jnp.asarray(data[f"unit_{what}/{name}"]) for what in "wg")
    tx = orthograd()
    got, _ = tx.update(g, tx.init(w), w)
    # One element has no orthogonal part; the reference returns minus the gradient.
    expected = data[f"unit_g/{name}"] if g.size == 1 else data[f"unit_out/{name}"]
    assert relative_error(np.asarray(got)[None], expected[None]) <= 1e-6
