"""The same regression in a flax NNX loop and in an equinox loop, with a chain in the place of an optax optimizer.

python notebooks/scripts/jax_loops.py [--quick]
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import chainrule as cr
from chainrule import transforms as ct


def chain() -> optax.GradientTransformationExtraArgs:
    return cr.chain(ct.zero_nonfinite(), cr.chains.casmo(1e-2, tau_init_steps=10))


def data() -> tuple[jax.Array, jax.Array]:
    inputs = jax.random.normal(jax.random.key(0), (128, 8))
    return inputs, jnp.sin(inputs[:, :2])


class NNXModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden, self.out = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


def in_nnx(steps: int) -> list[float]:
    model = NNXModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, chain(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, inputs, targets):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(inputs) - targets) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    return [float(step(model, optimizer, *data())) for _ in range(steps)]


def in_equinox(steps: int) -> list[float]:
    model = eqx.nn.MLP(8, 2, 32, 1, jnp.tanh, key=jax.random.key(0))
    tx = chain()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, inputs, targets):
        def loss_of(m):
            return jnp.mean((jax.vmap(m)(inputs) - targets) ** 2)

        loss, grads = eqx.filter_value_and_grad(loss_of)(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for _ in range(steps):
        model, state, loss = step(model, state, *data())
        losses.append(float(loss))
    print(
        f"equinox: agar {cr.metrics(state)['agar']:.2f}, confidence {cr.metrics(state)['confidence']:.2f}"
    )
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: seconds")
    steps = 30 if parser.parse_args().quick else 500
    for name, losses in {"nnx": in_nnx(steps), "equinox": in_equinox(steps)}.items():
        print(f"{name}: {losses[0]:.4f} -> {losses[-1]:.4f}")
        assert losses[-1] < 0.8 * losses[0], f"{name}: the loss did not fall"


if __name__ == "__main__":
    main()
