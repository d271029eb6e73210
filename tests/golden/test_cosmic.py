"""COSMIC against the recordings of its repository, commit 96f1a8c."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
from chainrule.chains.cosmic import PRESETS, cosmic
from chainrule.transforms import TierPolicy, dequantize, quantize, retier, tier_signal
from tests.golden.replay import assert_follows, cases, recording

FILES = (
    "cosmic_full",
    "cosmic_gate",
    "cosmic_presets",
    "cosmic_quant4",
    "cosmic_real",
    "cosmic_tiered",
)

# What the repository does where the defaults here differ.
REFERENCE_POLICY = {
    "first_reassignment": None,
    "rounding": "half_even",
    "margin_baseline": "last_reassignment",
    "budget_counts": "parameters",
}
CHAIN_NAMES = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "ema_short_decay": "b1",
    "ema_long_decay": "b1_long",
    "beta2": "b2",
    "eps": "eps",
    "gate_tier_max": "gate_tier_max",
    "gate_min_scale": "gate_min_scale",
    "gate_warmup_steps": "gate_warmup_steps",
    "gate_update_interval": "gate_update_interval",
    "tier_lr_scales": "tier_scale",
    "min_lr_scale": "min_lr_scale",
    "preset": "preset",
    "tiered_state": "tiered",
}
POLICY_NAMES = {
    "ema_mismatch_weight": "mismatch_weight",
    "force_tier2_warmup_steps": "forced_until",
    "tier2_budget_ratio": "budget_ratio",
}


def policy_of(spec):
    """The tier policy of a variant: its `tier_config`, or its preset's, under this library's names."""
    config = dict(spec.get("tier_config") or {})
    preset = PRESETS.get(spec.get("preset"), {})
    base = preset.get("policy", TierPolicy())
    fractions, warm = dict(base.fractions), dict(base.warmup_fractions or {})
    for tier in (2, 1):
        if f"tier{tier}_fraction" in config:
            fractions[tier] = config.pop(f"tier{tier}_fraction")
        if f"tier{tier}_fraction_warmup" in config:
            warm[tier] = config.pop(f"tier{tier}_fraction_warmup")
    options = {POLICY_NAMES.get(name, name): value for name, value in config.items()}
    if options.get("min_tier_steps", 0) is None:
        options["min_tier_steps"] = 0
    options.setdefault("warmup_steps", base.warmup_steps)
    options.setdefault("reassignment_interval", base.reassignment_interval)
    forced = spec.get("force_tier2_layers", ())
    return TierPolicy(
        fractions, warmup_fractions=warm or None, forced=forced, **REFERENCE_POLICY, **options
    )


def chain_of(spec, group=None, **options):
    spec = {**spec, **(group or {})}
    arguments = {CHAIN_NAMES[name]: value for name, value in spec.items() if name in CHAIN_NAMES}
    if not spec.get("use_fused", True) and spec.get("beta2") == 0:
        arguments["b2"] = None  # unfused, beta2 = 0 means no denominator
    if not spec.get("use_fused", True) and not spec.get("tiered_state", True):
        arguments |= {"start": "gradient", "blend_by": "tier"}
    if spec.get("quant4"):
        arguments |= {"bits": 4, "smaller": "quantize", "start": "gradient"}
        arguments["block"] = spec.get("quant4_block_size", 256)
        if not spec.get("use_fused", True):
            arguments["block"] = None  # unfused has one scale a tensor
    # A recording of one of the repository's presets has the arguments of "original" beside it.
    own = {k: v for k, v in PRESETS["original"].items() if k not in ("policy", *arguments)}
    original = own if "preset" in arguments else {"preset": "original"}
    return cosmic(**arguments, policy=policy_of(spec), **original, **options)


def run(tx, params, gradients, losses):
    """Steps one by one, since tensors move between tiers; each assignment is a compilation."""

    @jax.jit
    def step(params, state, grads, value):
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params = {name: jnp.asarray(p) for name, p in params.items()}
    state, steps = tx.init(params), len(next(iter(gradients.values())))
    rows = []
    for t in range(steps):
        grads = {name: jnp.asarray(g[t]) for name, g in gradients.items()}
        state = retier(state, grads, params)
        loss = None if losses is None else jnp.float32(losses[t])
        params, state = step(params, state, grads, loss)
        tiered, gate = state.inner_state[0], state.inner_state[1]
        rows.append((params, tiered.assignment.tiers, gate.gate_scale, tiered.inner))
    return rows


def follow(case, run, **options):
    """Replays a case and holds its tiers, gates and parameters to the recorded ones."""
    rec, variant = recording(case.recording), case.variant
    spec = rec.variants[variant]
    groups = spec["groups"] or [{"names": rec.names}]
    losses = None
    if spec["uses_loss"]:
        losses = rec.data.get(f"{variant}/loss", rec.data.get("loss"))
    gradients, trajectory = rec.gradients(variant), {}
    tiers = np.zeros((rec.meta["T"], len(rec.names)), int)
    gates = np.zeros((rec.meta["T"], len(groups)))
    for index, group in enumerate(groups):
        names = group["names"]
        rows = run(
            chain_of(spec, {k: v for k, v in group.items() if k != "names"}, **options),
            {name: rec.params[name] for name in names},
            {name: gradients[name] for name in names},
            losses,
        )
        for name in names:
            trajectory[name] = np.stack([np.asarray(params[name]) for params, *_ in rows])
        tiers[:, [rec.names.index(name) for name in names]] = [row[1] for row in rows]
        gates[:, index] = [row[2] for row in rows]
    np.testing.assert_array_equal(tiers, rec.log(variant, "tier"))
    if spec.get("use_fused", True):  # unfused measures the gate on the momentum
        np.testing.assert_allclose(
            gates, rec.log(variant, "gate_scale"), rtol=bounds.RECORDED_STATISTIC
        )
    assert_follows(trajectory, rec, variant)


@pytest.mark.parametrize("case", cases(FILES))
def test_follows(case):
    follow(case, run, kernel="xla")


@pytest.mark.parametrize("case", cases(["cosmic_primitives"]))
def test_signal_and_packing(case):
    data = recording(case.recording).data
    kind, _, name = case.variant.partition("/")
    x = data.get(f"x/{name}", np.zeros(0))  # the empty tensor is not stored
    if kind == "tier_signal":
        np.testing.assert_allclose(
            tier_signal(x), data[case.variant], rtol=bounds.summed(x.size, "float64")
        )
        return
    packed = quantize(jnp.asarray(x), 4, x.size if kind == "pack" else int(kind[len("blocks") :]))
    codes, scale, unpacked = (data[f"{case.variant}/{part}"] for part in ("q", "scale", "unpacked"))
    np.testing.assert_array_equal(packed.codes, codes)
    np.testing.assert_allclose(packed.scale, np.ravel(scale), rtol=bounds.ELEMENTWISE)
    np.testing.assert_allclose(
        np.ravel(dequantize(packed)),
        np.ravel(unpacked),
        rtol=bounds.ELEMENTWISE,
        atol=bounds.FLUSHED,
    )


PACKED = [c for c in cases(["cosmic_quant4"]) if "fused_b" in c.id]


@pytest.mark.parametrize("case", PACKED)
def test_packed_bytes(case):
    hold_bytes(case, run, kernel="xla")


def hold_bytes(case, run, **options):
    """Replays a case and holds its packed EMAs to the recorded ones."""
    rec, variant = recording(case.recording), case.variant
    spec, gradients = rec.variants[variant], rec.gradients(variant)
    rows = run(chain_of(spec, **options), rec.params, gradients, None)
    for row, step in enumerate(rec.rec_steps):
        for i, name in enumerate(rec.names):
            if not rec.params[name].ndim:
                continue  # a scalar needs its scale for itself: it is not quantised here
            inner = rows[step - 1][3][i][0].inner_state
            for field, key in (("mu", "ema_short"), ("mu_long", "ema_long")):
                held = getattr(inner, field)
                expected = rec.data[f"{variant}/{key}_q/{name}"][row]
                n = rec.params[name].size  # an odd tensor leaves half a byte unused
                differ = (unpack(held.codes) - unpack(expected))[:n]
                # The reference multiplies and adds in another order: a value on the edge between
                # two codes may fall on the other side.
                assert np.abs(differ).max(initial=0) <= 1
                assert np.count_nonzero(differ) <= 0.01 * differ.size
                scale = rec.data[f"{variant}/{key}_scale/{name}"][row]
                # An average that is small by cancellation has the roundings of what it averages.
                small = bounds.RECORDED * np.max(scale)
                np.testing.assert_allclose(held.scale, scale, rtol=bounds.RECORDED, atol=small)


def unpack(codes):
    codes = np.asarray(codes, np.int64)
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1)
