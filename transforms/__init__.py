"""The atoms: small pure gradient transformations, one a file, and the algebra that composes them."""

from chainrule.transforms import _flax
from chainrule.transforms._apply import apply_updates
from chainrule.transforms._chain import chain, named_chain, posted
from chainrule.transforms._fused import fused
from chainrule.transforms._live import LiveState, hyperparams, live, set_hyperparams
from chainrule.transforms._metrics import metrics, state_bytes
from chainrule.transforms._momentum_leaf import MomentumLeaf
from chainrule.transforms._per_parameter import PerParameter
from chainrule.transforms._presets import presets
from chainrule.transforms._tier_moves import adopt, assign, retier
from chainrule.transforms.adaptive_beta1 import AdaptiveBeta1State, adaptive_beta1
from chainrule.transforms.agar_confidence import AgarConfidenceState, agar_confidence
from chainrule.transforms.cautious import CautiousState, cautious
from chainrule.transforms.compensated import CompensatedState, compensated
from chainrule.transforms.decay_and_rate import decay_and_rate
from chainrule.transforms.decoupled_weight_decay import decoupled_weight_decay
from chainrule.transforms.ema_momentum import EmaMomentumState, ema_momentum
from chainrule.transforms.gradient_gate import GradientGateState, gradient_gate
from chainrule.transforms.grokfast_ema import GrokfastEmaState, grokfast_ema
from chainrule.transforms.grokfast_ma import GrokfastMaState, grokfast_ma
from chainrule.transforms.momentum_alignment_mask import (
    MomentumAlignmentMaskState,
    momentum_alignment_mask,
)
from chainrule.transforms.newton_schulz import newton_schulz
from chainrule.transforms.orthograd import orthograd
from chainrule.transforms.quantized_state import (
    Quantized,
    QuantizedState,
    dequantize,
    quantize,
    quantized_state,
)
from chainrule.transforms.routing import HIDDEN_MATRICES, Routing
from chainrule.transforms.scale_by_adam import ScaleByAdamState, scale_by_adam
from chainrule.transforms.scale_by_belief import ScaleByBeliefState, scale_by_belief
from chainrule.transforms.scale_by_dual_ema import ScaleByDualEmaState, scale_by_dual_ema
from chainrule.transforms.scale_by_gradient_magnitude import (
    ScaleByGradientMagnitudeState,
    scale_by_gradient_magnitude,
)
from chainrule.transforms.scale_by_tensor_rms import ScaleByTensorRmsState, scale_by_tensor_rms
from chainrule.transforms.snr_confidence import SnrConfidenceState, snr_confidence
from chainrule.transforms.tier_policy import TierPolicy, tier_signal
from chainrule.transforms.tiered_state import TieredState, tiered_state
from chainrule.transforms.zero_nonfinite import ZeroNonfiniteState, zero_nonfinite

__all__ = [
    "HIDDEN_MATRICES",
    "AdaptiveBeta1State",
    "AgarConfidenceState",
    "CautiousState",
    "CompensatedState",
    "EmaMomentumState",
    "GradientGateState",
    "GrokfastEmaState",
    "GrokfastMaState",
    "LiveState",
    "MomentumAlignmentMaskState",
    "MomentumLeaf",
    "PerParameter",
    "Quantized",
    "QuantizedState",
    "Routing",
    "ScaleByAdamState",
    "ScaleByBeliefState",
    "ScaleByDualEmaState",
    "ScaleByGradientMagnitudeState",
    "ScaleByTensorRmsState",
    "SnrConfidenceState",
    "TierPolicy",
    "TieredState",
    "ZeroNonfiniteState",
    "adaptive_beta1",
    "adopt",
    "agar_confidence",
    "apply_updates",
    "assign",
    "cautious",
    "chain",
    "compensated",
    "decay_and_rate",
    "decoupled_weight_decay",
    "dequantize",
    "ema_momentum",
    "fused",
    "gradient_gate",
    "grokfast_ema",
    "grokfast_ma",
    "hyperparams",
    "live",
    "metrics",
    "momentum_alignment_mask",
    "named_chain",
    "newton_schulz",
    "orthograd",
    "posted",
    "presets",
    "quantize",
    "quantized_state",
    "retier",
    "scale_by_adam",
    "scale_by_belief",
    "scale_by_dual_ema",
    "scale_by_gradient_magnitude",
    "scale_by_tensor_rms",
    "set_hyperparams",
    "snr_confidence",
    "state_bytes",
    "tier_signal",
    "tiered_state",
    "zero_nonfinite",
]

_flax.register()
