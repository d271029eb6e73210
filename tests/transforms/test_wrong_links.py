"""What is given in place of a transformation, and moments that are kept for a part of the parameters: the error names
the atom, what it got and what to write."""

import jax
import jax.numpy as jnp
import optax
import pytest
import torch

import chainrule
from chainrule import chain, chains, named_chain, transforms
from harness import random_tree
from registry import TREE

PARAMS = random_tree(TREE, 0)
MASK = {"dense": True, "scale": False}
LABELS = {"dense": "a", "scale": "b"}


def sgd():
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: chain(transforms.scale_by_adam, optax.scale(-1.0)),
            r"chain: `links\[0\]` .* got the function `scale_by_adam` itself; call it: `scale_by_adam",
        ),
        (
            lambda: chain(optax.scale(-1.0), optax.scale_by_adam),
            r"chain: `links\[1\]` .* got the function `scale_by_adam` itself",
        ),
        (
            lambda: chain([transforms.scale_by_adam(), optax.scale(-1.0)]),
            r"chain: `links\[0\]` .* got a list; .*`chainrule\.chain\(\*links\)`",
        ),
        (
            lambda: chain(link for link in [optax.scale(-1.0)]),
            r"chain: `links\[0\]` .* got a generator; .*`chainrule\.chain\(\*links\)`",
        ),
        (lambda: chain(None), r"chain: `links\[0\]` .* got None; .*`optax\.identity\(\)`"),
        (lambda: chain(1e-3), r"chain: `links\[0\]` .* got 0\.001; give an atom"),
        (
            lambda: named_chain(optax.scale(-1.0)),
            r"named_chain: `links` must be pairs of a name and a gradient transformation, got Gradient",
        ),
        (lambda: named_chain(("rate", optax.scale)), r"named_chain: `'rate'` .* function `scale`"),
        (lambda: chains.magma(chains.adam), r"magma: `inner` .* got the function `adam` itself"),
        (
            lambda: chains.magma(sgd()),
            r"magma: `inner` .* got the torch optimizer SGD; give a chain, .*`chainrule\.TorchBridge\(chain",
        ),
        (lambda: chains.grokfast([optax.sgd(0.1)]), r"grokfast: `inner` .* got a list"),
        (
            lambda: transforms.quantized_state(optax.scale_by_adam),
            r"quantized_state: `inner` .* got the function `scale_by_adam`",
        ),
        (
            lambda: transforms.tiered_state({0: optax.scale_by_sign}),
            r"tiered_state: `tiers\[0\]` .* got the function `scale_by_sign`",
        ),
    ],
)
def test_what_is_no_transformation_is_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_what_has_init_and_update_is_one():
    tx = chain(optax.MultiSteps(optax.sgd(0.1), 2))
    assert tx.init(PARAMS)[0].mini_step == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: chainrule.TorchBridge([torch.nn.Parameter(torch.ones(3))], chains.adam()),
            r"`params` is a gradient transformation; .* write `TorchBridge\(chain, params\)`",
        ),
        (
            lambda: chainrule.TorchBridge(torch.nn.Linear(2, 2).parameters(), chains.adam()),
            r"write `TorchBridge\(chain, params\)`",
        ),
        (
            lambda: chainrule.TorchBridge(sgd(), torch.nn.Linear(2, 2).parameters()),
            r"`chain` must be a gradient transformation, got the torch optimizer SGD",
        ),
        (
            lambda: chainrule.TorchBridge(chains.adam(), torch.nn.Linear(2, 2)),
            r"got the module Linear; give `model\.parameters\(\)`",
        ),
    ],
)
def test_the_arguments_of_a_bridge(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_retier_cannot_be_traced():
    state = chains.cosmic().init(PARAMS)
    with pytest.raises(TypeError, match=r"retier: .* cannot be traced; call .* outside `jit`"):
        jax.jit(lambda state: chainrule.retier(state, PARAMS, PARAMS))(state)
    adam = optax.adam(0.1).init(PARAMS)
    assert jax.jit(lambda state: chainrule.retier(state, PARAMS, PARAMS))(adam)[0].count == 0


def masked(tx):
    return optax.masked(tx, MASK)


def partitioned(tx):
    return optax.partition({"a": tx, "b": optax.sgd(0.1)}, LABELS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: chain(chains.muon(), transforms.agar_confidence()),
            r"agar_confidence: no earlier link keeps `nu` of 'dense/kernel'; put `agar_confidence` beside",
        ),
        (
            lambda: chain(masked(transforms.scale_by_belief()), transforms.snr_confidence()),
            r"snr_confidence: no earlier link keeps `mu` of 'scale'; .*`optax\.masked`",
        ),
        (
            lambda: chain(
                masked(optax.scale_by_adam()), transforms.momentum_alignment_mask(moment="nu")
            ),
            r"momentum_alignment_mask: no earlier link keeps `nu` of 'scale'; leave it out with `exclude`",
        ),
        (
            lambda: chain(
                transforms.tiered_state({0: optax.scale_by_sign()}, transforms.TierPolicy({})),
                partitioned(transforms.gradient_gate()),
            ),
            r"gradient_gate: the earlier `tiered_state` has 3 tensors, the updates have 2; put",
        ),
        *(
            (
                lambda atom=atom: chain(transforms.scale_by_belief(), optax.flatten(atom())),
                rf"{atom.__name__}: `{name}` must be like the updates, \(16,\), got .*`optax\.flatten\(",
            )
            for atom, name in (
                (transforms.cautious, "grad"),
                (transforms.scale_by_gradient_magnitude, "grad"),
                (transforms.gradient_gate, "grad"),
                (transforms.momentum_alignment_mask, "grad"),
                (transforms.agar_confidence, "mu"),
                (transforms.snr_confidence, "mu"),
            )
        ),
    ],
)
def test_partial_moments_name_the_atom(make, message):
    tx = make()
    with pytest.raises(ValueError, match=message):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_around_the_link_that_keeps_the_gradient_flatten_works():
    tx = optax.flatten(chain(transforms.scale_by_adam(), transforms.cautious()))
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


def test_a_gate_inside_a_partition_sees_its_own_gradients():
    gate = chain(optax.scale_by_sign(), transforms.gradient_gate(warmup_steps=0, update_interval=1))
    tx = chain(partitioned(gate))
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    alone, _ = gate.update(PARAMS["dense"], gate.init(PARAMS["dense"]))
    assert jnp.array_equal(updates["dense"]["kernel"], alone["kernel"])


@pytest.mark.parametrize("compile", [False, True])
def test_the_numbers_of_parameters_are_not_quantized(compile):
    """Each belongs to another parameter: in codes they would share one scale."""
    atom = transforms.momentum_alignment_mask(1.0, moment="own")
    tx = chain(transforms.quantized_state(atom, block=None))
    state = tx.init(PARAMS)
    assert isinstance(state[0].inner_state.alignment.values, jax.Array)
    w = torch.nn.Parameter(torch.ones(3))
    bridge = chainrule.TorchBridge(tx, [w], compile=compile)
    w.grad = torch.ones(3)
    bridge.step()
    updates, _ = tx.update({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}))
    torch.testing.assert_close(w.detach(), 1 + torch.tensor(updates["w"].tolist()))
