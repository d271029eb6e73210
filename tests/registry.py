"""One `Case` for every atom and chain. Being registered buys every property in `conformance/`.

To add one: append a `Case` to `ATOMS` or `CHAINS`. `test_registry.py` fails if a public transformation has none.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
import pytest

import bounds
import chainrule
from chainrule import chains, transforms
from chainrule.transforms import chain
from reference import adam as adam_reference
from reference import casmo as casmo_reference
from reference import cosmic as cosmic_reference
from reference import filters
from reference import magma as magma_reference
from reference import muon as muon_reference
from reference import stam as stam_reference
from reference.steps import Step, descent

Settings = Mapping[str, Any]
Shapes = Mapping[str, Mapping[str, tuple[int, ...]] | tuple[int, ...]]

TREE: Shapes = {"dense": {"bias": (3,), "kernel": (4, 3)}, "scale": ()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An atom or chain, what it accepts and refuses, and what it can do.

    An atom that needs another link to be of use is composed with it by `factory`: `chain(owner, atom(**settings))`.
    """

    name: str
    """Unique; the id of its tests."""
    public: Callable[..., Any]
    """The public function that it registers."""
    factory: Callable[..., optax.GradientTransformation] | None = None
    """Makes the transformation under test from a setting; default `public`."""
    settings: tuple[Settings, ...] = ({},)
    """Valid arguments. Every property runs on the first; those that need no compilation run on all."""
    errors: tuple[tuple[Settings, type[Exception], str], ...] = ()
    """Invalid arguments beyond the bounds of numbers, with the error's type and a regex of its message."""
    links: Callable[[], Sequence[optax.GradientTransformation]] | None = None
    """For a chain: the links of its first setting, by hand."""
    reference: Callable[..., Step] | None = None
    """The float64 oracle of a setting (same arguments)."""
    no_reference: str = ""
    """Why there is none."""
    alone: Callable[..., optax.GradientTransformation] | None = None
    """The atom without the link it needs: its update must raise a `ValueError` that names what is missing."""
    missing: str = ""
    """Regex of that error's message."""
    shapes: Shapes = dataclasses.field(default_factory=lambda: TREE)
    """Parameters it is tried on."""
    needs_params: bool = False
    """`update` without parameters is a `ValueError`."""
    complex_error: str = ""
    """Regex of the `TypeError` that complex parameters raise; empty: they work."""
    stateless: bool = False
    """Keeps nothing like the parameters, so integer leaves and another structure are no errors of its own."""
    unbounded: tuple[str, ...] = ()
    """Numeric arguments that are not in the table of bounds: any number will do, or `errors` holds their own."""
    zeroes_nonfinite: bool = False
    """NaN and infinite gradients are zeroed and the metric `nonfinite` says so; else the updates or state show them."""
    half_tolerance: float = bounds.halved("bfloat16", 3)
    """Largest difference of half precision from float32, relative to the largest entry of a leaf's updates."""
    tolerance: float = bounds.stepped(12)
    """Largest difference from the reference, relative to the largest entry of a leaf's updates so far."""

    def make(self, setting: Settings | None = None) -> optax.GradientTransformationExtraArgs:
        chosen = self.settings[0] if setting is None else setting
        return optax.with_extra_args_support((self.factory or self.public)(**chosen))


def after_adam(atom: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    """A factory of `atom` behind the moments of Adam."""

    @functools.wraps(atom)
    def factory(**settings):
        return chain(transforms.scale_by_adam(), atom(**settings))

    return factory


def around_adam(wrapper: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    """A factory of `wrapper` around AdamW."""

    def factory(learning_rate=1e-2, **settings):
        return wrapper(chains.adam(learning_rate, weight_decay=0.1), **settings)

    return factory


TIERS = (2, 1, 0)


def in_tiers(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` whose tensors are in `TIERS` in turn from the start, where `retier` would put them on the host."""

    def init(params):
        leaves = jax.tree.leaves(params)
        tiers = [TIERS[i % len(TIERS)] for i in range(len(leaves))]
        return transforms.assign(tx.init(params), tiers, params)

    return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(tx).update)


def _schedule(count):
    return 0.1 / (1.0 + count)


def _is_scale(path, _):
    return "scale" in path or not path  # or the only leaf


def _of_adam(
    learning_rate=1e-3, weight_decay: float | None = 0.0, nesterov: bool | str = False, **settings
) -> Step:
    return descent(adam_reference.adam(nesterov=nesterov, **settings), learning_rate, weight_decay)


ATOMS: tuple[Case, ...] = (
    Case(
        name="chain",
        public=transforms.chain,
        factory=lambda: chain(transforms.scale_by_adam(), optax.scale(-1e-3)),
        reference=lambda: descent(adam_reference.adam(), 1e-3),
    ),
    Case(
        name="named_chain",
        public=transforms.named_chain,
        factory=lambda: chainrule.named_chain(
            ("adam", transforms.scale_by_adam()), ("rate", optax.scale(-1e-3))
        ),
        reference=lambda: descent(adam_reference.adam(), 1e-3),
    ),
    Case(
        name="scale_by_adam",
        public=transforms.scale_by_adam,
        settings=(
            {},
            {"nesterov": True, "eps_root": 1e-6},
            {"nesterov": "keras", "b2": 0.99},
            {"eps_scope": "raw", "eps": 1e-3, "debias_eps": 1e-4},
            {"debias": False},
        ),
        errors=(
            (
                {"nesterov": "dozat"},
                ValueError,
                r"`nesterov` must be one of False, True, 'keras', got 'dozat'",
            ),
            ({"eps_scope": "both"}, ValueError, r"`eps_scope` must be one of 'corrected', 'raw'"),
            (
                {"b1": None, "nesterov": True},
                ValueError,
                r"`nesterov` needs a `b1` of its own.*give `b1` a number",
            ),
        ),
        reference=adam_reference.adam,
    ),
    Case(
        name="adaptive_beta1",
        public=transforms.adaptive_beta1,
        factory=lambda **settings: optax.chain(
            transforms.adaptive_beta1(**settings), transforms.scale_by_adam(b1=None)
        ),
        settings=(
            {},
            {"debias": False, "fallback_threshold": 1.0},
            {
                "adapt_strength": 0.5,
                "b1_base": 0.6,
                "tau_decay": 0.5,
                "b2": 0.9,
                "b1_update_interval": 3,
            },
            {"signal": "moments", "moment_decay": 0.9, "debias_eps": 1e-6, "max_abs": 0.5},
            {"nonfinite": "zero", "max_abs": 0.5},
            {"signal": "noise", "b1_base": 0.98, "adapt_strength": 0.45, "moment_decay": 0.9},
        ),
        zeroes_nonfinite=True,
        errors=(
            ({"nonfinite": "raise"}, ValueError, r"`nonfinite` must be one of 'skip', 'zero'"),
            (
                {"signal": "variance"},
                ValueError,
                r"`signal` must be one of 'residual', 'moments', 'noise'",
            ),
        ),
        reference=lambda **settings: stam_reference.adam_over(settings),
        complex_error="real floating-point",
    ),
    Case(
        name="scale_by_tensor_rms",
        public=transforms.scale_by_tensor_rms,
        settings=({}, {"decay": 0.5, "eps": 1e-2, "debias_eps": 1e-3}),
        reference=stam_reference.tensor_rms,
    ),
    Case(
        name="scale_by_tensor_rms, of a momentum leaf",
        public=transforms.scale_by_tensor_rms,
        factory=lambda **settings: optax.chain(
            transforms.adaptive_beta1(signal="moments"), transforms.scale_by_tensor_rms(**settings)
        ),
        reference=stam_reference.stam_lite_direction,
        complex_error="real floating-point",
        zeroes_nonfinite=True,
    ),
    Case(
        name="zero_nonfinite",
        public=transforms.zero_nonfinite,
        settings=({}, {"max_abs": None}, {"max_abs": 0.5}),
        reference=stam_reference.safe,
        zeroes_nonfinite=True,
        stateless=True,
    ),
    Case(
        name="decoupled_weight_decay",
        public=transforms.decoupled_weight_decay,
        factory=lambda weight_decay=0.1, **settings: transforms.decoupled_weight_decay(
            weight_decay, **settings
        ),
        reference=lambda: descent(lambda grads, _: {k: -g for k, g in grads.items()}, 1.0, -0.1),
        needs_params=True,
        stateless=True,
    ),
    Case(
        name="no decoupled_weight_decay",
        public=transforms.decoupled_weight_decay,
        settings=({"weight_decay": None},),
        reference=lambda weight_decay: lambda grads, _: grads,
        stateless=True,
    ),
    Case(
        name="compensated",
        public=transforms.compensated,
        factory=lambda **settings: optax.chain(
            optax.scale(-1.0), transforms.compensated(**settings)
        ),
        settings=({}, {"dtype": "float32"}),
        reference=lambda **_: descent(lambda grads, _: grads, 1.0),
        needs_params=True,
    ),
    Case(
        name="decay_and_rate",
        public=transforms.decay_and_rate,
        settings=(
            {"learning_rate": 0.1, "weight_decay": 0.5},
            {"learning_rate": _schedule},
            {},
        ),
        errors=(
            (
                {"weight_decay": 0.1},
                ValueError,
                r"weight_decay=0.1 with learning_rate=None; give both",
            ),
        ),
        reference=lambda learning_rate=-1.0, weight_decay=0.0: descent(
            lambda grads, _: grads, learning_rate, weight_decay
        ),
        needs_params=True,
        stateless=True,
    ),
    Case(
        name="cautious",
        public=transforms.cautious,
        factory=after_adam(transforms.cautious),
        settings=(
            {},
            {"normalizer": "mean", "eps": 1e-3},
            {"normalizer": "count", "negated": True},
            {"normalizer": "none"},
            {"normalizer": None},
        ),
        errors=(
            (
                {"normalizer": "max"},
                ValueError,
                r"`normalizer` must be one of 'clamped_mean', 'mean', 'count', 'none', got 'max'",
            ),
        ),
        reference=lambda **settings: filters.cautious(adam_reference.adam(), **settings),
        alone=transforms.cautious,
        missing=r"cautious: needs `grad`.*chainrule\.chain.*grad=",
    ),
    Case(
        name="ema_momentum",
        public=transforms.ema_momentum,
        settings=(
            {},
            {"nesterov": "raw", "decay": 0.5},
            {"nesterov": "elementwise"},
            {"nesterov": None},
            {"nesterov": None, "debias": True},
            {"debias": True},
        ),
        errors=(
            (
                {"nesterov": True},
                ValueError,
                r"`nesterov` must be one of None, 'lerp', 'raw', 'elementwise', got True",
            ),
            ({"nesterov": "raw", "debias": True}, ValueError, r"`debias` is for .* leave it False"),
        ),
        reference=muon_reference.ema_momentum,
    ),
    Case(
        name="newton_schulz",
        public=transforms.newton_schulz,
        settings=(
            {},
            {
                "coefficients": "dion",
                "steps": 3,
                "scale": "rms",
                "scale_factor": 0.2,
                "scale_axes": "out_in",
                "gram": True,
            },
            {"scale": None, "coefficients": (1.5, -0.5, 0.0), "steps": 3, "dual_norm": True},
            {"eps": 0.5, "eps_scope": "clamped", "scale_axes": (-2, -1), "dims": "oihw"},
            {"dims": "hwio", "gram": False},
            {"coefficients": "aol"},
            {"coefficients": "cans", "preconditioning": "schatten"},
        ),
        errors=(
            ({"steps": 0}, ValueError, r"`steps` must be in \[1, 100\), got 0"),
            ({"steps": 2.5}, TypeError, r"`steps` must be an integer, got 2.5"),
            (
                {"coefficients": "muon"},
                ValueError,
                r"`coefficients` must be one of 'keller_jordan'",
            ),
            ({"coefficients": (3.4, -4.8)}, ValueError, r"`coefficients` must be a name, three"),
            (
                {"coefficients": "cans", "dtype": "bfloat16"},
                ValueError,
                r'"cans" have no margin .* diverge in bfloat16; use "polar_express"',
            ),
            ({"scale": "max"}, ValueError, r"`scale` must be one of 'spectral', 'rms', None"),
            ({"scale_axes": "out"}, ValueError, r"`scale_axes` must be one of 'in_out', 'out_in'"),
            ({"eps_scope": "max"}, ValueError, r"`eps_scope` must be one of 'added', 'clamped'"),
            ({"gram": "no"}, ValueError, r"`gram` must be one of False, True, 'auto'"),
            (
                {"preconditioning": "spectral"},
                ValueError,
                r"`preconditioning` must be one of 'frobenius', 'schatten', 'aol'",
            ),
            ({"dims": "nhwc"}, ValueError, r"`dims` must be one of 'batched', 'hwio', 'oihw'"),
            ({"dims": ((0,), (0,))}, ValueError, r"`dims` must name different axes of 'kernel'"),
            ({"dims": ((0,), (5,))}, ValueError, r"`dims` must name different axes of 'kernel'"),
        ),
        reference=muon_reference.newton_schulz,
        # Far from square: small singular values, and their rounding errors, grow some hundredfold.
        shapes={"kernel": (2, 2, 8), "tall": (6, 2), "wide": (2, 6)},
        stateless=True,
        half_tolerance=bounds.RECORDED_BF16_MATRIX,
        tolerance=bounds.iterated(
            np.linspace(0.1, 1, 4), muon_reference.COEFFICIENTS["keller_jordan"]
        ),
    ),
    Case(
        name="grokfast_ema",
        public=transforms.grokfast_ema,
        settings=({}, {"start": "zero", "alpha": 0.5, "lamb": 5.0}),
        errors=(({"start": "g"}, ValueError, r"`start` must be one of 'first', 'zero', got 'g'"),),
        reference=filters.grokfast_ema,
    ),
    Case(
        name="grokfast_ma",
        public=transforms.grokfast_ma,
        settings=({"window_size": 3}, {"window_size": 4, "warmup": False, "lamb": 1.0}),
        reference=filters.grokfast_ma,
    ),
    Case(
        name="orthograd",
        public=transforms.orthograd,
        reference=filters.orthograd,
        needs_params=True,
        stateless=True,
    ),
    Case(
        name="momentum_alignment_mask",
        public=transforms.momentum_alignment_mask,
        unbounded=("seed",),
        factory=after_adam(transforms.momentum_alignment_mask),
        settings=(
            {},
            {"mask_prob": 1.0, "moment": "own", "momentum_beta": 0.5, "init_alignment": 0.5},
            {"tau": 0.5, "alignment_ema": 0.5, "exclude": "bias", "seed": 1, "moment": "nu"},
        ),
        errors=(
            ({"moment": "m"}, ValueError, r"`moment` must be one of 'mu', 'nu', 'trace', 'own'"),
            (
                {"exclude": "gain"},
                ValueError,
                r"`exclude` pattern 'gain' matches none of the leaves",
            ),
        ),
        reference=lambda **settings: magma_reference.magma(adam_reference.adam(), **settings),
        alone=transforms.momentum_alignment_mask,
        missing=r"momentum_alignment_mask: needs `grad`.*chainrule\.chain.*grad=",
    ),
    Case(
        name="agar_confidence",
        public=transforms.agar_confidence,
        factory=after_adam(transforms.agar_confidence),
        settings=(
            {"tau_init_steps": 3},
            {
                "tau_init_steps": 5,
                "granularity": "parameter",
                "clamp_factor": 2.0,
                "center": "median",
            },
            {
                "tau_init_steps": 7,
                "granularity": "parameter",
                "shared_calibration": True,
                "adapt_c_min": True,
                "tau_clip_range": (0.01, 0.5),
                "debias": False,
                "eps": 1e-8,
            },
            {"tau_init_steps": 3, "source": "direction"},
            {"tau_init_steps": 3, "source": "own", "b1": 0.5},
        ),
        errors=(
            (
                {"source": "mu"},
                ValueError,
                r"`source` must be one of 'upstream', 'direction', 'own'",
            ),
            (
                {"granularity": "leaf"},
                ValueError,
                r"`granularity` must be one of 'group', 'parameter'",
            ),
            ({"center": "mode"}, ValueError, r"`center` must be one of 'mean', 'median'"),
            ({"tau_init_steps": 2.5}, ValueError, r"`tau_init_steps` is the length of a buffer"),
            (
                {"tau_clip_range": (0.5, 0.1)},
                ValueError,
                r"0 <= low <= high <= 1, got \(0.5, 0.1\)",
            ),
            (
                {"clamp_factor": 2.0, "source": "direction"},
                ValueError,
                r"`clamp_factor` clamps the moments.*use source=\"upstream\"",
            ),
        ),
        alone=transforms.agar_confidence,
        missing=r"agar_confidence: needs `mu`.*chainrule\.chain.*source=\"direction\".*source=\"own\"",
        complex_error="real floating-point",
        reference=lambda **settings: casmo_reference.agar_confidence(
            adam_reference.adam(), **settings
        ),
    ),
    Case(
        name="scale_by_belief",
        public=transforms.scale_by_belief,
        settings=({}, {"deviation": "raw", "b1": 0.5, "eps": 1e-4}),
        errors=(({"deviation": "g"}, ValueError, r"`deviation` must be one of 'unbiased', 'raw'"),),
        complex_error="real floating-point",
        reference=casmo_reference.belief,
    ),
    Case(
        name="snr_confidence",
        public=transforms.snr_confidence,
        factory=lambda **settings: chain(
            transforms.scale_by_belief(), transforms.snr_confidence(**settings)
        ),
        settings=(
            {},
            {"robustness": 0.0, "rel_floor": 1.0},
            {"robustness": 2.0, "c_min": 0.05, "rel_floor": 0.0, "eps": 1e-3},
        ),
        errors=(({"deviation": "g"}, ValueError, r"`deviation` must be one of 'unbiased', 'raw'"),),
        alone=transforms.snr_confidence,
        missing=r"snr_confidence: needs `mu`.*chainrule\.chain.*scale_by_belief",
        complex_error="real floating-point",
        reference=lambda robustness=0.5, c_min=0.1, rel_floor=0.1, eps=1e-8: casmo_reference.belief(
            confidence=(robustness, c_min, rel_floor, eps)
        ),
    ),
    Case(
        name="scale_by_dual_ema",
        public=transforms.scale_by_dual_ema,
        settings=(
            {},
            {"blend": 0.5, "start": "gradient", "b1": 0.5},
            {"b2": None, "blend": 0.25},
            {"blend": 0.0, "debias": "second"},
            {"keep_long": True},
        ),
        errors=(
            ({"start": "g"}, ValueError, r"`start` must be one of 'zero', 'gradient', got 'g'"),
            ({"debias": "first"}, ValueError, r"`debias` must be one of 'both', 'second'"),
            ({"clock": "wall"}, ValueError, r"`clock` must be one of 'own', 'chain'"),
            ({"blend": (0.0, 2.0)}, ValueError, r"`blend` must be in \[0, 1\], got 2.0"),
        ),
        alone=lambda: transforms.scale_by_dual_ema(blend=(0.0, 0.5, 1.0)),
        missing=r"scale_by_dual_ema: needs `synced_tier`.*tiered_state",
        reference=cosmic_reference.dual_ema,
    ),
    Case(
        name="scale_by_gradient_magnitude",
        public=transforms.scale_by_gradient_magnitude,
        factory=lambda **settings: chain(
            optax.scale_by_sign(), transforms.scale_by_gradient_magnitude(**settings)
        ),
        settings=({}, {"decay": 0.5}),
        alone=transforms.scale_by_gradient_magnitude,
        missing=r"scale_by_gradient_magnitude: needs `grad`.*chainrule\.chain.*grad=",
        reference=cosmic_reference.sign_times_magnitude,
    ),
    Case(
        name="gradient_gate",
        public=transforms.gradient_gate,
        factory=lambda **settings: chain(
            optax.scale_by_sign(), transforms.gradient_gate(**settings)
        ),
        settings=(
            {"warmup_steps": 0, "update_interval": 1},
            {"warmup_steps": 4, "update_interval": 3, "min_scale": 0.5},
            {"tier_scale": (0.05,), "min_lr_scale": 0.2},
            {"tier_max": -1},
        ),
        alone=transforms.gradient_gate,
        missing=r"gradient_gate: needs `grad`.*chainrule\.chain.*grad=",
        reference=lambda **settings: cosmic_reference.gated(cosmic_reference.sign, **settings),
        stateless=True,
    ),
    Case(
        name="tiered_state",
        public=transforms.tiered_state,
        factory=lambda: in_tiers(
            transforms.tiered_state(
                {
                    2: transforms.scale_by_adam(),
                    1: transforms.scale_by_tensor_rms(),
                    0: optax.scale_by_sign(),
                }
            )
        ),
        reference=lambda: cosmic_reference.tiered(
            TIERS,
            {2: adam_reference.adam(), 1: stam_reference.tensor_rms(), 0: cosmic_reference.sign},
        ),
    ),
    Case(
        name="quantized_state",
        public=transforms.quantized_state,
        factory=lambda **settings: transforms.quantized_state(
            transforms.scale_by_adam(), **settings
        ),
        settings=(
            {"block": 4},
            {"block": 5, "bits": 8, "smaller": "quantize", "rounding": "stochastic", "seed": 1},
            {"block": None, "fields": ("mu",)},
            {"bits": None},
        ),
        errors=(
            ({"bits": 3}, ValueError, r"`bits` must be one of None, 4, 8, got 3"),
            ({"rounding": "up"}, ValueError, r"`rounding` must be one of 'nearest', 'stochastic'"),
            ({"smaller": "drop"}, ValueError, r"`smaller` must be one of 'keep', 'quantize'"),
            ({"block": 0}, ValueError, r"`block` must be at least 1, got 0"),
        ),
        no_reference="the rounding of a block; replayed nibble by nibble in tests/golden/test_cosmic.py",
        unbounded=("bits", "block", "seed"),
        half_tolerance=1.0,  # an entry of a block may fall between two codes, a quantum apart
    ),
)

CHAINS: tuple[Case, ...] = (
    Case(
        name="adam",
        public=chains.adam,
        settings=(
            {"weight_decay": 0.1},
            {"learning_rate": _schedule, "weight_decay": None, "b1": 0.5, "eps_root": 1e-6},
            {"eps_scope": "raw", "eps": 1e-3, "debias": False},
        ),
        links=lambda: (
            transforms.scale_by_adam(),
            transforms.decoupled_weight_decay(0.1),
            optax.scale_by_learning_rate(1e-3),
        ),
        reference=_of_adam,
        needs_params=True,
    ),
    Case(
        name="nadam",
        public=chains.nadam,
        settings=({"weight_decay": 0.1},),
        links=lambda: (
            transforms.scale_by_adam(nesterov=True),
            transforms.decoupled_weight_decay(0.1),
            optax.scale_by_learning_rate(1e-3),
        ),
        reference=functools.partial(_of_adam, nesterov=True),
        needs_params=True,
    ),
    Case(
        name="stam",
        public=chains.stam,
        settings=(
            {},
            {
                "learning_rate": _schedule,
                "weight_decay": None,
                "adapt_strength": 0.5,
                "b1_base": 0.8,
            },
            {"debias": False, "debias_eps": 1e-8, "max_abs": None, "fallback_threshold": 2.0},
        ),
        links=lambda: (
            transforms.adaptive_beta1(),
            transforms.scale_by_adam(b1=None),
            transforms.decoupled_weight_decay(0.01),
            optax.scale_by_learning_rate(1e-3),
        ),
        reference=lambda learning_rate=1e-3, weight_decay=0.01, **settings: descent(
            stam_reference.stam_direction(**settings), learning_rate, weight_decay
        ),
        needs_params=True,
        complex_error="real floating-point",
        zeroes_nonfinite=True,
    ),
    Case(
        name="stam_lite",
        public=chains.stam_lite,
        settings=(
            {},
            {
                "learning_rate": _schedule,
                "weight_decay": None,
                "b1_update_interval": 3,
                "moment_decay": 0.9,
            },
            {"debias_eps": 1e-8, "adapt_strength": 0.0, "max_abs": 0.5},
        ),
        links=lambda: (
            transforms.adaptive_beta1(signal="moments", b1_update_interval=5),
            transforms.scale_by_tensor_rms(),
            transforms.decoupled_weight_decay(0.01),
            optax.scale_by_learning_rate(1e-3),
        ),
        reference=lambda learning_rate=1e-3, weight_decay=0.01, b1_update_interval=5, **settings: (
            descent(
                stam_reference.stam_lite_direction(
                    b1_update_interval=b1_update_interval, **settings
                ),
                learning_rate,
                weight_decay,
            )
        ),
        needs_params=True,
        complex_error="real floating-point",
        zeroes_nonfinite=True,
    ),
    Case(
        name="muon",
        public=chains.muon,
        settings=(
            {"weight_decay": 0.1},
            {
                "learning_rate": _schedule,
                "weight_decay": None,
                "nesterov": None,
                "debias": True,
                "coefficients": "dion",
                "dims": "hwio",
                "scale": "rms",
                "scale_factor": 0.2,
                "adam_lr_ratio": 0.5,
                "adam_weight_decay": 0.1,
                "use_nadam": True,
            },
        ),
        errors=(
            (
                {"routing": transforms.Routing(exclude="head")},
                ValueError,
                r"`exclude` pattern 'head' matches none of the leaves 'conv/kernel', 'dense/bias'",
            ),
            (
                {"routing": transforms.Routing(labels="sgd")},
                ValueError,
                r"`labels` must be 'muon', 'adam' or None, got 'sgd'",
            ),
            (
                {"routing": transforms.Routing(labels="muon")},
                ValueError,
                r"'dense/bias' has shape \(3,\), expected .* matrix; send vectors and scalars",
            ),
        ),
        links=lambda: (
            optax.partition(
                {
                    "muon": chain(transforms.ema_momentum(), transforms.newton_schulz()),
                    "adam": chain(transforms.scale_by_adam(0.9, 0.95, 1e-10), optax.scale(0.015)),
                },
                transforms.Routing(),
            ),
            transforms.decoupled_weight_decay(0.1),
            optax.scale_by_learning_rate(0.02),
        ),
        reference=lambda learning_rate=0.02, weight_decay=0.0, **settings: descent(
            muon_reference.muon_direction(**settings), learning_rate, weight_decay
        ),
        shapes={"conv": {"kernel": (2, 2, 3, 8)}, "dense": {"bias": (3,), "kernel": (5, 2)}},
        needs_params=True,
        half_tolerance=bounds.RECORDED_BF16_MATRIX,
    ),
    Case(
        name="magma",
        public=chains.magma,
        unbounded=("seed",),
        factory=lambda **settings: chains.magma(chains.adam(1e-2, weight_decay=0.1), **settings),
        settings=({}, {"mask_prob": 1.0, "moment": "own"}),
        links=lambda: (chains.adam(1e-2, weight_decay=0.1), transforms.momentum_alignment_mask()),
        reference=lambda **settings: magma_reference.magma(_of_adam(1e-2, 0.1), **settings),
        needs_params=True,
    ),
    Case(
        name="magma, around a direction",
        public=chains.magma,
        unbounded=("seed",),
        factory=lambda **settings: chains.magma(transforms.scale_by_adam(), **settings),
        settings=({"learning_rate": 0.1, "weight_decay": 0.5, "exclude": _is_scale},),
        links=lambda: (
            transforms.scale_by_adam(),
            transforms.momentum_alignment_mask(exclude=_is_scale),
            transforms.decay_and_rate(0.1, weight_decay=0.5),
        ),
        reference=lambda **settings: magma_reference.magma(adam_reference.adam(), **settings),
        needs_params=True,
    ),
    Case(
        name="chains.grokfast",
        public=chains.grokfast,
        factory=around_adam(chains.grokfast),
        settings=({}, {"start": "zero", "alpha": 0.5}),
        links=lambda: (transforms.grokfast_ema(), chains.adam(1e-2, weight_decay=0.1)),
        reference=lambda **settings: filters.then(
            filters.grokfast_ema(**settings), _of_adam(1e-2, 0.1)
        ),
        needs_params=True,
    ),
    Case(
        name="chains.orthograd",
        public=chains.orthograd,
        factory=around_adam(chains.orthograd),
        links=lambda: (transforms.orthograd(), chains.adam(1e-2, weight_decay=0.1)),
        reference=lambda: filters.then(filters.orthograd(), _of_adam(1e-2, 0.1)),
        needs_params=True,
    ),
    Case(
        name="casmo",
        public=chains.casmo,
        settings=(
            {"tau_init_steps": 3, "weight_decay": 0.1},
            {
                "learning_rate": _schedule,
                "weight_decay": None,
                "tau_init_steps": 4,
                "granularity": "parameter",
                "agar_clamp_factor": 2.0,
            },
            {},
        ),
        errors=(
            ({"tau_init_steps": 2.5}, ValueError, r"`tau_init_steps` is the length of a buffer"),
        ),
        links=lambda: (
            transforms.scale_by_adam(),
            transforms.agar_confidence(3),
            transforms.decoupled_weight_decay(0.1),
            optax.scale_by_learning_rate(1e-3),
        ),
        needs_params=True,
        complex_error="real floating-point",
        reference=lambda learning_rate=1e-3, weight_decay=0.0, agar_clamp_factor=None, **settings: (
            descent(
                casmo_reference.agar_confidence(
                    adam_reference.adam(), clamp_factor=agar_clamp_factor, **settings
                ),
                learning_rate,
                weight_decay,
            )
        ),
    ),
    Case(
        name="casmo_snr",
        public=chains.casmo_snr,
        settings=(
            {"weight_decay": 0.1},
            {
                "learning_rate": _schedule,
                "weight_decay": None,
                "robustness": 2.0,
                "deviation": "raw",
            },
        ),
        links=lambda: (
            transforms.scale_by_belief(),
            transforms.snr_confidence(),
            transforms.decoupled_weight_decay(0.1),
            optax.scale_by_learning_rate(1e-3),
        ),
        needs_params=True,
        complex_error="real floating-point",
        reference=lambda learning_rate=1e-3, weight_decay=0.0, deviation="unbiased", robustness=0.5: (
            descent(
                casmo_reference.belief(
                    deviation=deviation, confidence=(robustness, 0.1, 0.1, 1e-8)
                ),
                learning_rate,
                weight_decay,
            )
        ),
    ),
    Case(
        name="cosmic",
        public=chains.cosmic,
        factory=lambda **settings: in_tiers(chains.cosmic(**settings)),
        settings=(
            {"weight_decay": 0.1, "gate_warmup_steps": 0, "gate_update_interval": 1},
            {
                "learning_rate": _schedule,
                "weight_decay": None,
                "gate_tier_max": 2,
                "gate_warmup_steps": 2,
                "gate_update_interval": 2,
                "tier_scale": (0.5, 1.0, 2.0),
                "kernel": "xla",
            },
        ),
        errors=(
            (
                {"preset": "slow"},
                ValueError,
                r"`preset` must be one of None, 'original', 'safe', 'fast', 'memory'",
            ),
            ({"bits": 3}, ValueError, r"`bits` must be one of None, 4, 8"),
        ),
        links=lambda: (
            in_tiers(
                transforms.tiered_state(
                    {
                        2: transforms.scale_by_dual_ema(),
                        1: chain(optax.scale_by_sign(), transforms.scale_by_gradient_magnitude()),
                        0: optax.scale_by_sign(),
                    }
                )
            ),
            transforms.gradient_gate(warmup_steps=0, update_interval=1),
            transforms.decoupled_weight_decay(0.1),
            optax.scale_by_learning_rate(1e-3),
        ),
        reference=lambda learning_rate=1e-3, weight_decay=0.0, kernel="", tier_scale=(1.0, 1.0, 1.0), **gate: (
            descent(
                cosmic_reference.gated(
                    cosmic_reference.tiered(
                        TIERS,
                        {
                            2: cosmic_reference.dual_ema(),
                            1: cosmic_reference.sign_times_magnitude(),
                            0: cosmic_reference.sign,
                        },
                    ),
                    tiers=TIERS,
                    tier_scale=tier_scale,
                    **{name.removeprefix("gate_"): value for name, value in gate.items()},
                ),
                learning_rate,
                weight_decay,
            )
        ),
        needs_params=True,
        unbounded=("block",),
    ),
)

CASES = ATOMS + CHAINS


every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
every_chain = pytest.mark.parametrize("case", CHAINS, ids=[case.name for case in CHAINS])
every_setting = pytest.mark.parametrize(
    ("case", "setting"),
    [
        pytest.param(case, setting, id=f"{case.name}-{index}")
        for case in CASES
        for index, setting in enumerate(case.settings)
    ],
)
