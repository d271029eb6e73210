"""A map from AGAR to confidence that fits itself to the first samples it sees, then never changes.

    before:  confidence = clip(agar, c_min, 1)
    after:   confidence = c_min + (1 - c_min) sigmoid((agar - tau) / std)

tau and std are the centre and spread of the first `steps` finite samples. A calibration has the
shape `()`, or `(n,)` for n of them side by side; each takes samples from the last axis of what it
is given, in order.
"""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from chainrule.transforms._checks import check_bounds, check_choice
from chainrule.transforms._numerics import root

_LEAST_STD = 0.01
_PERCENTILES = (10, 50, 90)


def _keep(_: jax.Array, *old: jax.Array) -> tuple[jax.Array, ...]:
    return old


def check_calibration(
    owner: str, steps: Any, center: str, tau_clip_range: tuple[float, float] | None
) -> None:
    """Raises `ValueError` for arguments of `agar_confidence` that no calibration can have."""
    check_bounds(owner, tau_init_steps=steps)
    check_choice(owner, "center", center, ("mean", "median"))
    if steps is not None and not isinstance(steps, numbers.Integral):
        raise ValueError(
            f"{owner}: `tau_init_steps` is the length of a buffer, an integer, got {steps!r}"
        )
    if tau_clip_range is not None:
        low, high = tau_clip_range
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"{owner}: `tau_clip_range` must be (low, high) with 0 <= low <= high <= 1, got {tau_clip_range}"
            )


class CalibrationState(NamedTuple):
    """One calibration, or n side by side: `[n]` stands for the axis that one alone has not."""

    samples: jax.Array
    """float32 [n] x steps: AGAR of the first steps, zero where not yet filled."""
    filled: jax.Array
    """int32 [n]: samples taken."""
    tau: jax.Array
    """float32 [n]: centre of the samples; zero until calibrated, as the next two."""
    std: jax.Array
    """float32 [n]: standard deviation of the samples, at least 0.01."""
    percentiles: jax.Array
    """float32 [n] x 3: 10th, 50th and 90th percentile of the samples."""
    c_min: jax.Array
    """float32 [n]: least confidence in the last update."""
    calibrated: jax.Array
    """bool [n]: all samples are taken."""

    metric_fields = ("tau", "std", "percentiles", "c_min", "calibrated")


class Calibration(NamedTuple):
    """How the samples become a map; see `agar_confidence` for the arguments."""

    steps: int
    center: str
    tau_clip_range: tuple[float, float] | None
    c_min: jax.typing.ArrayLike
    adapt_c_min: bool

    def init(self, shape: tuple[int, ...]) -> CalibrationState:
        """The state of the calibrations of that shape, before any sample."""
        zeros = jnp.zeros(shape, jnp.float32)
        return CalibrationState(
            samples=jnp.zeros((*shape, self.steps), jnp.float32),
            filled=jnp.zeros(shape, jnp.int32),
            tau=zeros,
            std=jnp.zeros_like(zeros),
            percentiles=jnp.zeros((*shape, len(_PERCENTILES)), jnp.float32),
            c_min=jnp.full(shape, self.c_min, jnp.float32),
            calibrated=jnp.zeros(shape, bool),
        )

    def __call__(
        self, state: CalibrationState, agar: jax.Array, counts: jax.Array
    ) -> tuple[CalibrationState, jax.Array]:
        """Takes samples and maps them, so that the last sample of a calibration is already mapped
        by it.

        Args:
          state: of shape [n].
          agar: float32 [n] x k, the samples in the order in which they are taken.
          counts: bool of that shape: whether a sample may be taken. One that is not finite never
          is.

        Returns:
          The new state and the confidence of each of `agar`; of one that is not finite, the least.
        """
        finite = jnp.isfinite(agar)
        taken = finite & counts
        reached = state.filled[..., None] + jnp.cumsum(taken, axis=-1, dtype=jnp.int32)
        # Slots are compared instead of scattered to: the arrays are small, and a full buffer is hit
        # by no sample.
        hit = (jnp.arange(self.steps) == reached[..., None] - 1) & taken[..., None]
        new = jnp.sum(jnp.where(hit, agar[..., None], 0), axis=-2)
        samples = jnp.where(jnp.any(hit, axis=-2), new, state.samples)
        filled = state.filled + jnp.sum(taken, axis=-1, dtype=jnp.int32)
        filled = jnp.minimum(filled, self.steps)

        calibrated = filled >= self.steps
        now = calibrated & ~state.calibrated
        old = (state.tau, state.std, state.percentiles, state.c_min)
        fitted = jax.lax.cond(jnp.any(now), self._fit, _keep, samples, *old)
        tau, std, percentiles, fitted_c_min = (
            jnp.where(now.reshape(now.shape + (1,) * (x.ndim - now.ndim)), x, o)
            for x, o in zip(fitted, old, strict=True)
        )
        c_min = jnp.asarray(self.c_min, jnp.float32)
        least = fitted_c_min if self.adapt_c_min else c_min
        least = jnp.broadcast_to(jnp.where(calibrated, least, c_min), calibrated.shape)

        def along(x: jax.Array) -> jax.Array:
            return x[..., None]

        safe = jnp.where(finite, agar, 0)
        trust = jax.nn.sigmoid((safe - along(tau)) / jnp.maximum(along(std), _LEAST_STD))
        after = along(least) + (1 - along(least)) * trust
        confidence = jnp.where(reached >= self.steps, after, jnp.clip(safe, c_min, 1))
        return (
            CalibrationState(samples, filled, tau, std, percentiles, least, calibrated),
            jnp.where(finite, confidence, along(least)),
        )

    def _fit(self, samples: jax.Array, *_: jax.Array) -> tuple[jax.Array, ...]:
        ordered = jnp.sort(samples, axis=-1)

        def percentile(q: int) -> jax.Array:
            position = q / 100 * (self.steps - 1)
            low = int(position)
            high, weight = min(low + 1, self.steps - 1), position - low
            return (1 - weight) * ordered[..., low] + weight * ordered[..., high]

        percentiles = jnp.stack([percentile(q) for q in _PERCENTILES], axis=-1)
        mean, std = jnp.mean(samples, axis=-1), root(jnp.var(samples, axis=-1))
        tau = mean if self.center == "mean" else percentiles[..., 1]
        if self.tau_clip_range is not None:
            tau = jnp.clip(tau, *self.tau_clip_range)
        variation = std / (mean + 1e-8)
        c_min = jnp.where(variation > 0.5, 0.1, jnp.where(variation > 0.3, 0.3, 0.5))
        return tau, jnp.maximum(std, _LEAST_STD), percentiles, c_min.astype(jnp.float32)
