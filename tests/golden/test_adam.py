"""Adam and its relatives against optax, C-Optim and KerasOptimizers."""

import optax
import pytest

from chainrule import chains
from chainrule.transforms import cautious, chain, decoupled_weight_decay
from tests.golden.replay import assert_follows, cases, recording, replay


def lion(hp, normalizer, b1, b2, weight_decay):
    return chain(
        optax.scale_by_lion(b1, b2),
        cautious(normalizer),
        decoupled_weight_decay(weight_decay),
        optax.scale_by_learning_rate(hp["learning_rate"]),
    )


def optax_lion(hp):
    return lion(hp, None, hp.get("b1", 0.9), hp.get("b2", 0.99), hp.get("weight_decay", 1e-3))


def c_lion(hp):
    hp = {**hp, "learning_rate": hp["lr"]}
    return lion(hp, "count", *hp.get("betas", (0.9, 0.99)), hp.get("weight_decay", 0.0))


def c_adamw(eps_scope):
    def build(hp):
        b1, b2 = hp.get("betas", (0.9, 0.999))
        return chains.adam(
            hp.get("lr", 1e-3),
            b1,
            b2,
            weight_decay=hp.get("weight_decay", 0.0),
            debias=hp.get("correct_bias", True),
            eps_scope=eps_scope,
            preset="cautious",
            **({"eps": hp["eps"]} if "eps" in hp else {}),
        )

    return build


def keras(make):
    """KerasOptimizers: decay before the update comes to the same as decoupled decay within it."""

    def build(hp):
        names = {"learning_rate": "learning_rate", "beta_1": "b1", "beta_2": "b2"}
        names |= {"epsilon": "eps", "weight_decay": "weight_decay"}
        given = {name: hp[theirs] for theirs, name in names.items() if theirs in hp}
        caution = "mean" if hp.get("caution") else None
        return make(caution=caution, preset="keras", **given)

    return build


BUILDERS = {
    "optax_adamw": lambda hp: chains.adam(**{"weight_decay": 1e-4, **hp}),
    "optax_nadamw": lambda hp: chains.nadam(**{"weight_decay": 1e-4, **hp}),
    "optax_adam_b": lambda hp: chains.adam(weight_decay=None, **hp),
    "optax_lion": optax_lion,
    "C-Optim C-AdamW foreach=False": c_adamw("raw"),
    "C-Optim C-AdamW foreach=True (default, dynamo disabled)": c_adamw("corrected"),
    "C-Optim C-Lion": c_lion,
    "KerasOptimizers Adam": keras(chains.adam),
    "KerasOptimizers Nadam": keras(chains.nadam),
    "adam_head": keras(chains.adam),
    "nadam_caution": keras(chains.nadam),
}
FILES = ("canon_adam", "keras_adam", "keras_real")
CASES = [
    case
    for case in cases(FILES)
    if recording(case.values[0].recording).variants[case.values[0].variant]["algo"] in BUILDERS
]


@pytest.mark.parametrize("case", CASES)
def test_follows(case):
    rec, variant = recording(case.recording), case.variant
    spec = rec.variants[variant]
    run = replay(BUILDERS[spec["algo"]](spec["hp"]), rec.params, rec.gradients(variant))
    assert_follows(run.params, rec, variant)
