"""What every bridge shares: one step of a chain as a pure function of flat arrays, whatever framework computes it.

Nothing here knows a framework beyond JAX. `description.describe` is the way in: it traces a chain for parameters of
given shapes and says what a step takes and returns, and where each leaf of the state belongs.
"""
