"""CASMO's first version (commit 2bed798) and its 0.4 form (commit e81a36e) against their recordings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
from chainrule import chains
from chainrule.transforms import snr_confidence
from tests.golden.replay import assert_follows, cases, columns, recording, replay

FILES = (
    "casmo_big",
    "casmo_head_open",
    "casmo_head_real",
    "casmo_seed_open",
    "casmo_seed_real",
    "casmo_seed_scale",
)


def seed(spec):
    """The repository's first version: clipped median, raw and clamped moments, eps, adapted c_min."""
    b1, b2 = spec.get("betas", (0.9, 0.999))
    own = {name: spec[name] for name in ("tau_clip_range", "agar_clamp_factor") if name in spec}
    return chains.casmo(
        spec["lr"],
        b1,
        b2,
        eps=spec.get("eps", 1e-8),
        weight_decay=spec.get("weight_decay", 0.0),
        tau_init_steps=spec["tau_init_steps"],
        c_min=spec.get("c_min", 0.1),
        granularity=spec.get("granularity", "group"),
        preset="original",
        **own,
    )


def head(spec):
    """The repository's 0.4 form: deviations from a moment that starts at zero."""
    b1, b2 = spec.get("betas", (0.9, 0.999))
    return chains.casmo_snr(
        spec["lr"],
        b1,
        b2,
        eps=spec.get("eps", 1e-8),
        weight_decay=spec.get("weight_decay", 0.0),
        c_min=spec.get("c_min", 0.1),
        robustness=spec.get("robustness", 0.5),
        rel_floor=spec.get("rel_floor", 0.1),
        preset="original",
    )


def of_seed(files):
    return [p for p in cases(files) if "seed" in algorithm(p.values[0])]


def of_head(files):
    return [p for p in cases(files) if "HEAD" in algorithm(p.values[0])]


def algorithm(case):
    return recording(case.recording).variants[case.variant]["algo"]


def groups_of(rec, spec):
    """Each parameter group: the names of its tensors and its settings over those of the variant."""
    groups = spec["groups"] or [{"names": rec.names}]
    return [(g["names"], {**spec, **{k: v for k, v in g.items() if k != "names"}}) for g in groups]


@pytest.mark.parametrize("case", of_seed(FILES))
def test_seed_follows(case):
    rec, variant = recording(case.recording), case.variant
    spec = rec.variants[variant]
    groups = groups_of(rec, spec)
    labels = {name: str(i) for i, (names, _) in enumerate(groups) for name in names}
    tx = optax.partition({str(i): seed(settings) for i, (_, settings) in enumerate(groups)}, labels)

    def log(state):
        inner = [state.inner_states[str(i)].inner_state.inner_state for i in range(len(groups))]
        return [(s[0], s[1]) for s in inner]

    run = replay(tx, rec.params, rec.gradients(variant), log=log)
    assert_follows(run.params, rec, variant)

    def expect(got, what, rows=slice(None), **tolerance):
        expected = rec.log(variant, what)
        got = np.asarray(got, np.float64)
        np.testing.assert_allclose(got[rows], expected[rows], err_msg=what, **tolerance)

    confidence = [s for _, s in run.logs]
    if spec.get("granularity", "group") == "group":
        expect(
            np.stack([s.agar for s in confidence], 1),
            "agar",
            rtol=bounds.RECORDED_STATISTIC,
            atol=1e-8,
        )
        expect(
            np.stack([s.confidence for s in confidence], 1), "conf", rtol=bounds.RECORDED_STATISTIC
        )
    else:
        expect(
            columns(confidence[0].agar.tree(), rec.names),
            "agar",
            rtol=bounds.RECORDED_STATISTIC,
            atol=1e-8,
        )
        expect(
            columns(confidence[0].confidence.tree(), rec.names),
            "conf",
            rtol=bounds.RECORDED_STATISTIC,
        )
    maps = [s.calibration for s in confidence]
    calibrated = np.stack([m.calibrated for m in maps], 1)
    np.testing.assert_array_equal(calibrated, rec.log(variant, "tau_init"))
    for what in ("tau", "std", "c_min", "mean", "p10", "p90"):
        got = {
            "mean": lambda m: m.samples.mean(-1),
            "p10": lambda m: m.percentiles[..., 0],
            "p90": lambda m: m.percentiles[..., 2],
        }.get(what, lambda m, what=what: getattr(m, what))
        logged = np.stack([got(m) for m in maps], 1)
        # All are frozen once calibrated; before, the repository logs NaN or its constructor's c_min.
        expect(logged, what.replace("_", ""), calibrated.all(1), rtol=bounds.RECORDED_STATISTIC)


@pytest.mark.parametrize("case", of_head(FILES))
def test_head_follows(case):
    rec, variant = recording(case.recording), case.variant
    spec = rec.variants[variant]
    tx = head(spec)
    atom = snr_confidence(
        robustness=spec.get("robustness", 0.5),
        c_min=spec.get("c_min", 0.1),
        rel_floor=spec.get("rel_floor", 0.1),
        eps=spec.get("eps", 1e-8),
        b1=spec.get("betas", (0.9, 0.999))[0],
        b2=spec.get("betas", (0.9, 0.999))[1],
        deviation="raw",
    )

    def log(state):
        moments, shown = state.inner_state[:2]
        ones = jax.tree.map(jnp.ones_like, moments.mu)
        confidence, _ = atom.update(
            ones, atom.init(ones), mu=moments.mu, nu=moments.nu, count=moments.count
        )
        size = sum(x.size for x in jax.tree.leaves(ones))
        mean = sum(jnp.sum(x) for x in jax.tree.leaves(confidence)) / size
        return shown.agar, mean, moments

    run = replay(tx, rec.params, rec.gradients(variant), log=log)
    assert_follows(run.params, rec, variant)
    agar, mean, moments = run.logs
    per_tensor = columns(agar.tree(), rec.names)
    sizes = np.array([rec.params[name].size for name in rec.names])
    for got, what in (
        (per_tensor, "agar_per_tensor"),
        (per_tensor @ sizes / sizes.sum(), "agar_mean"),
        (mean, "confidence_mean"),
    ):
        np.testing.assert_allclose(
            got, rec.log(variant, what), rtol=bounds.RECORDED_STATISTIC, atol=1e-8, err_msg=what
        )
    for field, what in (("mu", "final_m"), ("nu", "final_s")):
        final = {name: x[-1] for name, x in getattr(moments, field).items()}
        for name, expected in rec.recorded(variant, what).items():
            scale = np.abs(expected).max()
            bound = bounds.RECORDED + bounds.live(spec.get("betas", (0.9, 0.999))[1])
            np.testing.assert_allclose(final[name], expected, rtol=0, atol=bound * scale)
