"""The atoms: small pure gradient transformations, one a file, and the algebra that composes them."""

from chainrule.transforms._chain import chain, named_chain, posted
from chainrule.transforms._live import LiveState, hyperparams, live, set_hyperparams
from chainrule.transforms._metrics import metrics, state_bytes
from chainrule.transforms._momentum_leaf import MomentumLeaf
from chainrule.transforms.adaptive_beta1 import AdaptiveBeta1State, adaptive_beta1
from chainrule.transforms.cautious import CautiousState, cautious
from chainrule.transforms.decoupled_weight_decay import decoupled_weight_decay
from chainrule.transforms.scale_by_adam import ScaleByAdamState, scale_by_adam
from chainrule.transforms.scale_by_tensor_rms import ScaleByTensorRmsState, scale_by_tensor_rms
from chainrule.transforms.zero_nonfinite import ZeroNonfiniteState, zero_nonfinite

__all__ = [
    "AdaptiveBeta1State",
    "CautiousState",
    "LiveState",
    "MomentumLeaf",
    "ScaleByAdamState",
    "ScaleByTensorRmsState",
    "ZeroNonfiniteState",
    "adaptive_beta1",
    "cautious",
    "chain",
    "decoupled_weight_decay",
    "hyperparams",
    "live",
    "metrics",
    "named_chain",
    "posted",
    "scale_by_adam",
    "scale_by_tensor_rms",
    "set_hyperparams",
    "state_bytes",
    "zero_nonfinite",
]
