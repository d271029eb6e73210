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


def noisy_digits(sizes: Mapping[str, Any]) -> Task:
    """Digits of which `sizes["wrong"]` are labelled wrong, and hidden layers.

    Metrics are of right labels: "validation" and "loss" in nats, "validation_accuracy" and "accuracy".

    `sizes`: "steps", "batch", "hidden" (widths) and "wrong"; with "drawn", digits of a font. Split and wrong labels
    are the seed's.
    """
    images, labels = data.drawn_digits() if sizes.get("drawn") else data.digits()

    def draw(seed):
        random = np.random.default_rng(seed)
        train, validation, test = data.split(random, len(labels), 300, 500)
        params = models.Mlp(random, (64, *sizes["hidden"], 10))
        drawn = {
            "labels": data.wrong_labels(random, labels, sizes["wrong"], 10),
            "batches": data.batches(random, train, sizes["batch"], sizes["steps"]),
            "validation": validation,
            "test": test,
        }
        return params, drawn

    def loss(params, shared, drawn, step):
        rows = drawn["batches"][step]
        logits = params(shared["images"][rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, drawn["labels"][rows]).mean()

    def evaluate(params, shared, drawn):
        found = {}
        for name, prefix in (("validation", "validation_"), ("test", "")):
            labels = shared["labels"][drawn[name]]
            logits = params(shared["images"][drawn[name]])
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            found[prefix.rstrip("_") or "loss"] = nats
            found[f"{prefix}accuracy"] = jnp.mean(jnp.argmax(logits, -1) == labels)
        return found

    shared = {"images": images.reshape(len(images), -1), "labels": labels}
    return Task(jax.tree.map(jnp.asarray, shared), draw, loss, evaluate)
