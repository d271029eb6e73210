"""The atoms: small pure gradient transformations, one a file, and the algebra that composes them."""

from chainrule.transforms._chain import chain, named_chain, posted
from chainrule.transforms._live import LiveState, hyperparams, live, set_hyperparams
from chainrule.transforms._metrics import metrics, state_bytes
from chainrule.transforms._momentum_leaf import MomentumLeaf
from chainrule.transforms.adaptive_beta1 import AdaptiveBeta1State, adaptive_beta1
from chainrule.transforms.agar_confidence import AgarConfidenceState, agar_confidence
from chainrule.transforms.cautious import CautiousState, cautious
from chainrule.transforms.decay_and_rate import decay_and_rate
from chainrule.transforms.decoupled_weight_decay import decoupled_weight_decay
from chainrule.transforms.ema_momentum import EmaMomentumState, ema_momentum
from chainrule.transforms.grokfast_ema import GrokfastEmaState, grokfast_ema
from chainrule.transforms.grokfast_ma import GrokfastMaState, grokfast_ma
from chainrule.transforms.momentum_alignment_mask import (
    MomentumAlignmentMaskState,
    momentum_alignment_mask,
)
from chainrule.transforms.newton_schulz import newton_schulz
from chainrule.transforms.orthograd import orthograd
from chainrule.transforms.routing import HIDDEN_MATRICES, Routing
from chainrule.transforms.scale_by_adam import ScaleByAdamState, scale_by_adam
from chainrule.transforms.scale_by_belief import ScaleByBeliefState, scale_by_belief
from chainrule.transforms.scale_by_tensor_rms import ScaleByTensorRmsState, scale_by_tensor_rms
from chainrule.transforms.snr_confidence import SnrConfidenceState, snr_confidence
from chainrule.transforms.zero_nonfinite import ZeroNonfiniteState, zero_nonfinite

__all__ = [
    "HIDDEN_MATRICES",
    "AdaptiveBeta1State",
    "AgarConfidenceState",
    "CautiousState",
    "EmaMomentumState",
    "GrokfastEmaState",
    "GrokfastMaState",
    "LiveState",
    "MomentumAlignmentMaskState",
    "MomentumLeaf",
    "Routing",
    "ScaleByAdamState",
    "ScaleByBeliefState",
    "ScaleByTensorRmsState",
    "SnrConfidenceState",
    "ZeroNonfiniteState",
    "adaptive_beta1",
    "agar_confidence",
    "cautious",
    "chain",
    "decay_and_rate",
    "decoupled_weight_decay",
    "ema_momentum",
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
    "scale_by_adam",
    "scale_by_belief",
    "scale_by_tensor_rms",
    "set_hyperparams",
    "snr_confidence",
    "state_bytes",
    "zero_nonfinite",
]
