"""Magma against the recordings of its repository and of its package, with the recorded draws."""

import numpy as np
import optax
import pytest

import bounds
from chainrule import chains
from chainrule.transforms import chain, decoupled_weight_decay
from tests.golden.replay import assert_follows, cases, columns, recording, replay

MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu", "momentum_buffer": "trace", None: "own"}


def base(spec):
    """The optimizer of torch inside, and the name of the moment that Magma finds in it by itself."""
    kw = dict(spec["base_kw"])
    lr = kw.pop("lr")
    if spec["base"] == "sgd":
        momentum = kw.pop("momentum", None)
        inner = optax.sgd(lr, momentum)
        found = "own" if momentum is None else "trace"
        coupled = kw.pop("weight_decay", None)
    else:
        b1, b2 = kw.pop("betas", (0.9, 0.999))
        decoupled = spec["base"] == "adamw"
        weight_decay = kw.pop("weight_decay", 0.01 if decoupled else None)
        inner = chains.adam(
            lr, b1, b2, eps=kw.pop("eps", 1e-8), weight_decay=weight_decay if decoupled else None
        )
        found = "mu"
        coupled = None if decoupled else weight_decay
    assert not kw, kw
    return chain(decoupled_weight_decay(coupled), inner), found


def magma(spec, names):
    inner, moment = base(spec)
    preset = "pypi" if spec["algo"] == "Magma pypi" else "original"
    if spec.get("moment_key", "auto") != "auto":
        moment = MOMENTS[spec["moment_key"]]
    given = ("mask_prob", "tau", "alignment_ema", "momentum_beta")
    return chains.magma(
        inner,
        **{name: spec[name] for name in given if name in spec},
        **({} if preset == "pypi" else {"moment": moment}),
        preset=preset,
        exclude={name: name in spec["exclude"] for name in names},
    )


FILES = ("magma_head", "magma_pypi", "magma_real")


@pytest.mark.parametrize("case", cases(FILES))
def test_follows(case):
    rec, variant = recording(case.recording), case.variant
    spec = rec.variants[variant]
    draws = rec.log(variant, "mask").astype(np.float32)
    run = replay(
        magma(spec, rec.names),
        rec.params,
        rec.gradients(variant),
        log=lambda state: state.inner_state[1],
        extra={"mask": {name: draws[:, i] for i, name in enumerate(rec.names)}},
    )
    assert_follows(run.params, rec, variant)
    included = [i for i, name in enumerate(rec.names) if name not in spec["exclude"]]
    names = [rec.names[i] for i in included]
    for field, what in (("cosine", "cos"), ("alignment", "alignment")):
        got, expected = columns(getattr(run.logs, field).tree(), names), rec.log(variant, what)
        bound = 2 * bounds.summed(max(rec.params[name].size for name in names))  # of a cosine
        np.testing.assert_allclose(got, expected[:, included], rtol=0, atol=bound, err_msg=what)
