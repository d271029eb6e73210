"""Tasks that more than one experiment trains on."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chainrule.evidence import data, models
from chainrule.evidence.experiment import Task


def language(sizes: Mapping[str, Any]) -> Task:
    """A decoder of characters on the standard library; metrics "validation" and "loss", nats a character, held out.

    `sizes`: "steps", "batch", "places", "width", "depth" and "windows", of each held-out text.
    """
    train, *held_out = data.standard_library()
    places = sizes["places"]

    def draw(seed):
        random = np.random.default_rng(seed)
        params = models.CharTransformer(
            random, data.VOCABULARY, places, sizes["width"], sizes["depth"]
        )
        starts = random.integers(len(train) - places, size=(sizes["steps"], sizes["batch"]))
        return params, {"starts": starts.astype(np.int32)}

    def cross_entropy(params, text):
        logits = params(text[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()

    def loss(params, shared, drawn, step):
        places_of = drawn["starts"][step][:, None] + jnp.arange(places + 1)
        return cross_entropy(params, shared["train"][places_of])

    def evaluate(params, shared, drawn):
        del drawn
        return {name: cross_entropy(params, shared[name]) for name in ("validation", "loss")}

    texts = [data.windows(text, sizes["windows"], places + 1) for text in held_out]
    shared = dict(zip(("train", "validation", "loss"), [train, *texts], strict=True))
    return Task(jax.tree.map(jnp.asarray, shared), draw, loss, evaluate)
