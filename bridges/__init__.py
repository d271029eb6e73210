"""Bridges: any chain, ours or optax's, in another framework. A framework is imported only by its own bridge."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chainrule.bridges.keras_optimizer import KerasBridge
    from chainrule.bridges.torch_optim import TorchBridge

__all__ = ["KerasBridge", "TorchBridge"]


def __getattr__(name: str) -> Any:
    if name == "KerasBridge":
        from chainrule.bridges.keras_optimizer import KerasBridge

        return KerasBridge
    if name == "TorchBridge":
        from chainrule.bridges.torch_optim import TorchBridge

        return TorchBridge
    raise AttributeError(f"module 'chainrule.bridges' has no attribute {name!r}")
