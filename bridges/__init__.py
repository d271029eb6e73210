"""Bridges: any chain, ours or optax's, in another framework. A framework is imported only by its own bridge."""
