"""An algebra of gradient transformations: published optimizers as chains of small atoms.

import chainrule, optax
tx = chainrule.chains.casmo(learning_rate=3e-4)
tx = optax.chain(chainrule.transforms.adaptive_beta1(), chainrule.transforms.scale_by_adam())
optimizer = chainrule.TorchBridge(tx, model.parameters())
"""

import importlib
from typing import TYPE_CHECKING, Any

from chainrule import chains, transforms
from chainrule.logs import JsonFormatter
from chainrule.transforms import (
    TierPolicy,
    apply_updates,
    chain,
    fused,
    hyperparams,
    metrics,
    named_chain,
    retier,
    set_hyperparams,
)

if TYPE_CHECKING:
    from chainrule import keras_optimizers, torch_optimizers
    from chainrule.bridges.export import export
    from chainrule.bridges.hub import convert_state
    from chainrule.bridges.keras_optimizer import KerasBridge
    from chainrule.bridges.torch_optim import TorchBridge
    from chainrule.bridges.torch_routing import torch_routing
    from chainrule.bridges.torch_wrap import TorchWrap
    from chainrule.planning import Plan, plan

__version__ = "0.2.0"

__all__ = [
    "JsonFormatter",
    "KerasBridge",
    "Plan",
    "TierPolicy",
    "TorchBridge",
    "TorchWrap",
    "apply_updates",
    "chain",
    "chains",
    "convert_state",
    "export",
    "fused",
    "hyperparams",
    "keras_optimizers",
    "metrics",
    "named_chain",
    "plan",
    "retier",
    "set_hyperparams",
    "torch_optimizers",
    "torch_routing",
    "transforms",
]


_HOMES = {
    "KerasBridge": "chainrule.bridges.keras_optimizer",
    "Plan": "chainrule.planning",
    "TorchBridge": "chainrule.bridges.torch_optim",
    "TorchWrap": "chainrule.bridges.torch_wrap",
    "convert_state": "chainrule.bridges.hub",
    "export": "chainrule.bridges.export",
    "plan": "chainrule.planning",
    "torch_routing": "chainrule.bridges.torch_routing",
}
"""What is imported when it is asked for, not before: most of it needs torch or keras, which are extras."""


def __getattr__(name: str) -> Any:
    if name in ("keras_optimizers", "torch_optimizers"):
        return _home(f"chainrule.{name}", name)
    if name in _HOMES:
        return getattr(_home(_HOMES[name], name), name)
    raise AttributeError(f"module 'chainrule' has no attribute {name!r}")


def _home(module: str, name: str) -> Any:
    """The module of a name that needs an extra; without it the error says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name in ("torch", "keras"):
            raise ModuleNotFoundError(
                f'chainrule.{name} needs {error.name}; install it with: pip install "chainrule[{error.name}]"',
                name=error.name,
            ) from error
        raise
