"""The registry itself: complete, and each case says enough."""

import inspect

import optax
import pytest

from chainrule import chains, transforms
from registry import CASES, CHAINS, every_case, every_chain


def transformations(module):
    """The public functions of `module` that return a gradient transformation."""
    named = {name: getattr(module, name) for name in module.__all__}
    return {
        name: function
        for name, function in named.items()
        if inspect.isfunction(function)
        and isinstance(returned := inspect.signature(function).return_annotation, type)
        and issubclass(returned, optax.GradientTransformation)
    }


@pytest.mark.parametrize("module", [transforms, chains], ids=lambda module: module.__name__)
def test_everything_public_is_registered(module):
    registered = {case.public for case in CASES}
    missing = [name for name, f in transformations(module).items() if f not in registered]
    assert not missing, f"give {missing} a Case in tests/registry.py"


def test_every_chain_is_registered_as_a_chain():
    assert {case.public for case in CHAINS} == set(transformations(chains).values())


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


@every_case
def test_a_case_has_a_reference_or_says_why_not(case):
    assert (case.reference is None) == bool(case.no_reference)


@every_chain
def test_a_chain_has_its_links(case):
    assert case.links is not None


@every_case
def test_a_dependent_atom_says_what_it_misses(case):
    assert (case.alone is None) == (case.missing == "")
