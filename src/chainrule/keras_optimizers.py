"""Optimizers of Keras by name: chains as classes, with the names and defaults of the repositories they come from."""
