r"""Which parameter deserves which tier of optimizer state: the host-side half of `tiered_state`.

    signal(g) = (mean|g| + 0.1 rms(g)) (1 + 0.25 min(var(g) / (mean|g|^2 + 1e-12), 8))
                                       (1 + 0.1 min(max|g| / (mean|g| + 1e-12), 8))

Tensors are ranked by an EMA of their signal; the first of them, within the fractions and the
budget, are candidates for the higher tiers, and a tensor moves when its candidacy is confirmed.
Source: COSMIC, repository commit 96f1a8c. Departures, each with an argument that reaches the
reference's behaviour: the first assignment is made at step 1; the number of tensors in a tier is
rounded up, so that a single tensor can leave tier 0; a signal is compared with the one at the
tensor's last move, so that demotion is possible; the budget counts the bytes of all state and is
never exceeded.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from chainrule.native import _kernel
from chainrule.transforms._checks import check_choice

_EPS = 1e-12


def tier_signal(gradient: Any) -> float:
    """COSMIC's measure of how much a tensor would gain from state; 0 for an empty tensor.

    >>> round(tier_signal(np.array([1.0, -1.0, 2.0])), 4)
    2.067
    """
    g = np.asarray(gradient).astype(np.float64, copy=False).reshape(-1)
    if g.size == 0:
        return 0.0
    magnitude, mean_square, mean = np.abs(g), np.dot(g, g) / g.size, g.mean()
    variance = max(0.0, mean_square - mean * mean)
    return _signal(magnitude.mean(), mean_square, variance, magnitude.max())


def _signal(mean_abs: float, mean_square: float, variance: float, peak: float) -> float:
    signal = mean_abs + 0.1 * math.sqrt(mean_square)
    signal *= 1 + 0.25 * min(variance / (mean_abs**2 + _EPS), 8.0)
    return float(signal * (1 + 0.1 * min(peak / (mean_abs + _EPS), 8.0)))


def tier_signals(gradients: Sequence[Any]) -> np.ndarray:
    """`tier_signal` of each tensor, in one pass of the compiled kernel where it is installed.

    >>> tier_signals([np.array([1.0, -1.0, 2.0], np.float32), np.zeros(0)]).round(4).tolist()
    [2.067, 0.0]
    """
    arrays = [np.asarray(g) for g in gradients]
    signals = np.zeros(len(arrays))
    fast = [
        i
        for i, g in enumerate(arrays)
        if _kernel and g.dtype == np.float32 and g.size and g.flags.c_contiguous
    ]
    if fast and _kernel:
        for i, statistics in zip(fast, _kernel.statistics([arrays[i] for i in fast]), strict=True):
            signals[i] = _signal(*statistics)
    for i in set(range(len(arrays))) - set(fast):
        signals[i] = tier_signal(arrays[i])
    return signals


class TierMemory(NamedTuple):
    """What the policy remembers of each tensor between reassignments: arrays with one entry a tensor."""

    signal: Any
    """float32: EMA of the signal, NaN before the first reassignment."""
    baseline: Any
    """float32: the signal that the next one is compared with, NaN before the first reassignment."""
    changed: Any
    """int32: the step of the last move."""
    pending: Any
    """int32: the tier that awaits confirmation, -1 if none does."""
    confirmations: Any
    """int32: how many reassignments in a row have asked for it."""


@dataclasses.dataclass(frozen=True)
class TierPolicy:
    """How tensors are assigned to tiers; every number may differ from COSMIC's only where its name says so.

    Args:
      fractions: the share of tensors in each tier above the lowest, as a mapping or pairs, each in
        [0, 1].
      warmup_fractions: the same for steps before `warmup_steps`; `None`: no difference.
      warmup_steps: also the step before which no tensor is demoted; `None`: two intervals.
      reassignment_interval: steps between reassignments, at least 1.
      first_reassignment: step of the first one; `None`: the interval, as in COSMIC, whose first 199
        steps are sign updates.
      min_tier_steps: steps a tensor stays in a tier at least.
      signal_ema_decay: decay of the signal's EMA over reassignments, in [0, 1); `None`: the raw
        signal.
      signal_margin: how far the signal must have risen (fallen), relatively, for promotion
        (demotion), at least 0.
      margin_baseline: since when. `"last_move"`; or `"last_reassignment"`, as in COSMIC, where with
        an EMA of 0.9 and a margin of 0.1 only a signal of exactly zero demotes.
      confirmations: reassignments in a row that must ask for a move, at least 1.
      rounding: of fraction x tensors, `"up"` or `"half_even"` (COSMIC).
      forced: tensors held in the highest tier whose slash-joined path contains one of these
        strings.
      forced_until: last step at which they are put there; `None`: always.
      budget_bytes: bound on the bytes, exact at every step; `None`: none.
      budget_ratio: the same as a share of the parameters' bytes.
      budget_counts: what the budget counts: `"state"`, every byte of every `tiered_state` given to
        one `retier`; or `"parameters"`, the parameters' bytes of each above the lowest tier at
        assignment, as in COSMIC.
      full_sync_interval: every so many steps all tensors are treated as if in `full_sync_tier` at
        least, by the gate and the tier's rate, not by the update rule; `None`: never.
      full_sync_tier: that tier.
      mismatch_weight: adds this times mean|mu - mu_long| to the signal of a tensor that has both,
        at least 0.

    Raises:
      ValueError: a number out of its range.

    >>> TierPolicy(fractions={2: 0.5}).fractions
    ((2, 0.5),)
    """

    fractions: Mapping[int, float] | Sequence[tuple[int, float]] = ((2, 0.3), (1, 0.3))
    _: dataclasses.KW_ONLY
    warmup_fractions: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    warmup_steps: int | None = None
    reassignment_interval: int = 200
    first_reassignment: int | None = 1
    min_tier_steps: int = 200
    signal_ema_decay: float | None = 0.9
    signal_margin: float = 0.1
    margin_baseline: str = "last_move"
    confirmations: int = 2
    rounding: str = "up"
    forced: Sequence[str] = ()
    forced_until: int | None = 200
    budget_bytes: int | None = None
    budget_ratio: float | None = None
    budget_counts: str = "state"
    full_sync_interval: int | None = 200
    full_sync_tier: int = 1
    mismatch_weight: float = 0.0

    def __post_init__(self):
        def check(name: str, low: float, high: float = math.inf) -> None:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"TierPolicy: `{name}` must be in [{low}, {high}], got {value}")

        for name in ("fractions", "warmup_fractions"):
            given = getattr(self, name)
            if given is None:
                continue
            pairs = given.items() if isinstance(given, Mapping) else given
            pairs = tuple(sorted(((int(t), float(f)) for t, f in pairs), reverse=True))
            if any(not 0 <= f <= 1 for _, f in pairs):
                raise ValueError(f"TierPolicy: `{name}` must be in [0, 1], got {dict(pairs)}")
            # Frozen and hashable: the policy is part of the state's static structure.
            object.__setattr__(self, name, pairs)
        object.__setattr__(self, "forced", tuple(self.forced))
        check("reassignment_interval", 1)
        check("first_reassignment", 1)
        check("warmup_steps", 0)
        check("min_tier_steps", 0)
        check("signal_ema_decay", 0, np.nextafter(1, 0))
        check("signal_margin", 0)
        check("confirmations", 1)
        check("forced_until", 0)
        check("budget_bytes", 0)
        check("budget_ratio", 0)
        check("full_sync_interval", 1)
        check("mismatch_weight", 0)
        check_choice(
            "TierPolicy",
            "margin_baseline",
            self.margin_baseline,
            ("last_move", "last_reassignment"),
        )
        check_choice("TierPolicy", "rounding", self.rounding, ("up", "half_even"))
        check_choice("TierPolicy", "budget_counts", self.budget_counts, ("state", "parameters"))

    @property
    def warmup(self) -> int:
        """The step before which warm-up fractions hold and nothing is demoted."""
        return 2 * self.reassignment_interval if self.warmup_steps is None else self.warmup_steps

    def due(self, step: int) -> bool:
        """Whether tensors are reassigned at this 1-based step."""
        return step % self.reassignment_interval == 0 or step == self.first_reassignment

    def memory(self, tensors: int) -> TierMemory:
        """The memory before the first reassignment."""
        nan = np.full(tensors, np.nan, np.float32)
        zero = np.zeros(tensors, np.int32)
        return TierMemory(nan, nan.copy(), zero, zero - 1, zero.copy())

    def budget(self, params: Sequence[Any]) -> int | None:
        """Bytes that the tiers may take for these parameters; `None`: any number."""
        if self.budget_ratio is not None:
            return int(self.budget_ratio * sum(p.size * p.dtype.itemsize for p in params))
        return self.budget_bytes

    def smooth(self, memory: TierMemory, raw: np.ndarray) -> np.ndarray:
        """The EMA of the signal after one more value; its first value is the first signal."""
        if self.signal_ema_decay is None:
            return raw
        old = np.asarray(memory.signal, np.float64)
        decay = self.signal_ema_decay
        return np.where(np.isnan(old), raw, decay * old + (1 - decay) * raw)

    def candidates(
        self,
        step: int,
        signals: np.ndarray,
        forced: Sequence[bool],
        fits: Callable[[int, int], bool],
    ) -> list[int]:
        """The tier each tensor is a candidate for.

        Args:
          step: 1-based.
          signals: one a tensor.
          forced: which are held in the highest tier.
          fits: called as `fits(tensor, tier)` in order of rank; true takes the bytes off the
            budget.
        """
        fractions = dict(self.fractions)
        if self.warmup_fractions is not None and step < self.warmup:
            warm = dict(self.warmup_fractions)
            fractions = {tier: warm.get(tier, share) for tier, share in fractions.items()}
        n = len(signals)

        def share_of(fraction: float) -> int:
            return (
                round(n * fraction)
                if self.rounding == "half_even"
                else math.ceil(n * fraction - 1e-9)
            )

        room = [[tier, max(0, share_of(fraction))] for tier, fraction in fractions.items()]
        highest = room[0][0] if room else 0
        tiers = [0] * n
        for i in range(n):
            if forced[i]:
                fits(i, highest)
                tiers[i] = highest
        if room:
            room[0][1] -= sum(forced)
        for i in sorted(range(n), key=lambda i: (-signals[i], i)):
            if forced[i]:
                continue
            for entry in room:
                if entry[1] > 0 and fits(i, entry[0]):
                    tiers[i] = entry[0]
                    entry[1] -= 1
                    break
                if entry[1] > 0 and self.budget_counts == "parameters":
                    break  # the parameter's own bytes fit in no other tier either
        return tiers

    def move(
        self,
        step: int,
        memory: TierMemory,
        current: Sequence[int],
        signals: np.ndarray,
        candidates: Sequence[int],
        forced: Sequence[bool],
    ) -> tuple[list[int], TierMemory]:
        """Confirms or refuses each candidacy: the new tiers, and the memory after it."""
        new = list(current)
        baseline, changed, pending, count = (np.array(a) for a in memory[1:])
        for i, (signal, tier) in enumerate(zip(signals, candidates, strict=True)):
            last, now = float(baseline[i]), current[i]
            first = math.isnan(last)
            put = first or (forced[i] and (self.forced_until is None or step <= self.forced_until))
            moves = put
            if not put:
                wanted = self._wanted(step, tier, now, float(signal), last, int(changed[i]))
                count[i] = (count[i] + 1 if pending[i] == wanted else 1) if wanted != now else 0
                pending[i] = wanted if wanted != now else -1
                moves = count[i] >= self.confirmations
                tier = wanted
            if moves:
                new[i], changed[i], pending[i], count[i] = tier, step, -1, 0
            if moves or self.margin_baseline == "last_reassignment":
                baseline[i] = signal
        return new, TierMemory(memory.signal, baseline, changed, pending, count)

    def _wanted(
        self, step: int, tier: int, now: int, signal: float, last: float, changed: int
    ) -> int:
        """The candidate tier, or the present one if the move is refused."""
        if tier == now or (self.min_tier_steps and step - changed < self.min_tier_steps):
            return now
        up = tier > now
        if step < self.warmup and not up:
            return now
        margin = self.signal_margin * max(abs(last), _EPS)
        enough = signal >= last + margin if up else signal <= last - margin
        return tier if enough else now
