"""An algebra of gradient transformations: published optimizers as chains of small atoms.

import chainrule, optax
tx = chainrule.chains.casmo(learning_rate=3e-4)
tx = optax.chain(chainrule.transforms.adaptive_beta1(), chainrule.transforms.scale_by_adam())
optimizer = chainrule.TorchBridge(tx, model.parameters())
"""

from typing import TYPE_CHECKING, Any

from chainrule import chains, transforms
from chainrule.logs import JsonFormatter
from chainrule.transforms import (
    TierPolicy,
    chain,
    hyperparams,
    metrics,
    named_chain,
    retier,
    set_hyperparams,
)

if TYPE_CHECKING:
    from chainrule.bridges.torch_optim import TorchBridge
    from chainrule.bridges.torch_routing import torch_routing

__version__ = "0.1.0"

__all__ = [
    "JsonFormatter",
    "TierPolicy",
    "TorchBridge",
    "chain",
    "chains",
    "hyperparams",
    "metrics",
    "named_chain",
    "retier",
    "set_hyperparams",
    "torch_routing",
    "transforms",
]


def __getattr__(name: str) -> Any:
    # torch is an extra: it is imported when what needs it is asked for, not before.
    if name == "TorchBridge":
        from chainrule.bridges.torch_optim import TorchBridge

        return TorchBridge
    if name == "torch_routing":
        from chainrule.bridges.torch_routing import torch_routing

        return torch_routing
    raise AttributeError(f"module 'chainrule' has no attribute {name!r}")
