"""Gradient filters before SGD and Adam against the official Grokfast and OrthoGrad and KerasOptimizers' wrappers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
from chainrule import chains
from chainrule.transforms import (
    Routing,
    chain,
    decoupled_weight_decay,
    grokfast_ma,
    orthograd,
    scale_by_adam,
)
from tests.golden.replay import assert_follows, cases, recording, replay


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


def constant_debias_adam(b1, b2, eps, *, eps_is_raw=False):
    """Adam as it runs where the step count stands still at 1: its bias corrections are constants."""
    root = (1 - b2) ** 0.5
    return chain(
        scale_by_adam(b1, b2, eps if eps_is_raw else eps * root, debias=False),
        optax.scale(root / (1 - b1)),
    )


def keras_muon(lr, weight_decay=0.004):
    """Muon at HEAD with the one of its two decays that a wrapper leaves it."""
    rest = chain(
        constant_debias_adam(0.9, 0.995, 1e-8),
        decoupled_weight_decay(weight_decay),
        optax.scale_by_learning_rate(lr),
    )
    matrices = chains.muon(
        lr,
        beta=0.95,
        weight_decay=weight_decay,
        nesterov="elementwise",
        ns_steps=6,
        ns_dtype="float32",
        dims="oihw",
        scale_axes=(-2, -1),
        routing=lambda tree: jax.tree.map(lambda _: "muon", tree),
    )
    return optax.partition({"muon": matrices, "adam": rest}, Routing(words=("bias", "embedding")))


def keras_base(spec, rec):
    """The wrapped optimizer as the wrapper runs it: its step count stands still, its base class does not decay."""
    lr = spec["hp"].get("learning_rate", float(rec.data.get("lr", 0.01)))
    return {
        "sgd": lambda: optax.sgd(lr),
        "sgdmom": lambda: optax.sgd(lr / 2, momentum=0.9),
        "kadam": lambda: chain(
            constant_debias_adam(0.9, 0.999, 1e-7, eps_is_raw=True), optax.scale(-lr)
        ),
        "radam": lambda: chain(constant_debias_adam(0.9, 0.995, 1e-8), optax.scale(-lr)),
        "muon HEAD f32 NS": lambda: keras_muon(lr),
    }[spec.get("base", "sgd")]()


def keras_grokfast(spec, rec):
    hp = spec["hp"]
    inner = keras_base(spec, rec)
    own = {name: hp[name] for name in ("alpha", "lamb") if name in hp}
    return chains.grokfast(inner, preset="keras", **own)


BUILDERS = {
    "official Grokfast EMA": lambda spec, rec: chains.grokfast(
        torch_base(spec), preset="original", **spec["hp"]
    ),
    "official Grokfast MA": lambda spec, rec: official_ma(spec, torch_base(spec)),
    "official OrthoGrad": lambda spec, rec: chains.orthograd(torch_base(spec), preset="original"),
    "Grokfast_EMA": keras_grokfast,
    "grok_sgd": keras_grokfast,
    "Orthograd": lambda spec, rec: chains.orthograd(keras_base(spec, rec)),
    "ortho_sgd": lambda spec, rec: chains.orthograd(keras_base(spec, rec)),
}
FILES = ("canon_grok_ortho", "keras_wrappers", "keras_real")


def spec_of(case):
    return recording(case.recording).variants[case.variant]


@pytest.mark.parametrize(
    "case", [p for p in cases(FILES) if spec_of(p.values[0])["algo"] in BUILDERS]
)
def test_follows(case):
    rec, variant, spec = recording(case.recording), case.variant, spec_of(case)
    paths = spec.get("paths", dict(zip(rec.names, rec.names, strict=True)))
    run = replay(
        BUILDERS[spec["algo"]](spec, rec),
        {paths[name]: p for name, p in rec.params.items()},
        {paths[name]: g for name, g in rec.gradients(variant).items()},
    )
    params = {name: run.params[paths[name]] for name in rec.names}
    # The references blow the rounding residue of a one-element tensor up to its gradient's length.
    degenerate = tuple(name for name, p in rec.params.items() if p.size == 1)
    assert_follows(params, rec, variant, skip=degenerate if "rtho" in spec["algo"] else ())


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
    wide, grad = np.float64(np.ravel(w)), np.float64(np.ravel(g))
    left = np.linalg.norm(grad - grad @ wide / (wide @ wide or 1.0) * wide)
    # What is left of the gradient is off by the rounding of its projection, and is drawn out to the old length with it.
    bound = 4 * bounds.summed(g.size) * np.linalg.norm(grad) ** 2 / left if left else 0.0
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound)
