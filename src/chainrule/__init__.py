"""An algebra of gradient transformations: published optimizers as chains of small atoms.

import chainrule, optax
tx = chainrule.chains.casmo(learning_rate=3e-4)
tx = optax.chain(chainrule.transforms.adaptive_beta1(), chainrule.transforms.scale_by_adam())
optimizer = chainrule.TorchBridge(tx, model.parameters())
"""

from typing import TYPE_CHECKING, Any

from chainrule import chains, transforms
from chainrule.logs import JsonFormatter
from chainrule.plan import Plan, plan
from chainrule.transforms import (
    TierPolicy,
    apply_updates,
    chain,
    hyperparams,
    metrics,
    named_chain,
    retier,
    set_hyperparams,
)

if TYPE_CHECKING:
    from chainrule import keras_optimizers
    from chainrule.bridges.keras_optimizer import KerasBridge
    from chainrule.bridges.torch_optim import TorchBridge
    from chainrule.bridges.torch_routing import torch_routing

__version__ = "0.1.0"

__all__ = [
    "JsonFormatter",
    "KerasBridge",
    "Plan",
    "TierPolicy",
    "TorchBridge",
    "apply_updates",
    "chain",
    "chains",
    "hyperparams",
    "keras_optimizers",
    "metrics",
    "named_chain",
    "plan",
    "retier",
    "set_hyperparams",
    "torch_routing",
    "transforms",
]


def __getattr__(name: str) -> Any:
    # torch and keras are extras: they are imported when what needs them is asked for, not before.
    if name == "TorchBridge":
        from chainrule.bridges.torch_optim import TorchBridge

        return TorchBridge
    if name == "torch_routing":
        from chainrule.bridges.torch_routing import torch_routing

        return torch_routing
    if name == "KerasBridge":
        from chainrule.bridges.keras_optimizer import KerasBridge

        return KerasBridge
    if name == "keras_optimizers":
        import chainrule.keras_optimizers as keras_optimizers

        return keras_optimizers
    raise AttributeError(f"module 'chainrule' has no attribute {name!r}")
