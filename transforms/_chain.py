"""`optax.chain` whose links also see what earlier links remember.

Information travels along a chain on three roads: the updates; extra arguments by name; and, from
`adaptive_beta1` to the atom that follows it, a momentum leaf. This module is the second road. A
link is called with

    grad                    the raw gradient that the chain was called with
    mu, nu, trace           the moments in the state of an earlier link, after this step's update of it
    count, b1               the step count and decay kept beside those moments

under the names that optax gives these fields, so `optax.scale_by_adam` provides `mu` and `nu` as
`scale_by_adam` does.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from chainrule.transforms._checks import check_link
from chainrule.transforms._per_parameter import PerParameter
from chainrule.transforms._protocols import Posts, Tree, holds_moments

_MOMENTS = ("mu", "nu", "trace")
_BESIDE = ("count", "b1")


def _merge(old: Any, new: Any) -> Any:
    """`new`, and `old` where `new` is masked: together the links of an `optax.partition` cover all
    leaves."""
    if isinstance(old, optax.MaskedNode) or isinstance(new, optax.MaskedNode):
        return new if isinstance(old, optax.MaskedNode) else old
    # Node by node, because one mask may stand for a whole subtree of the other.
    olds, structure = jax.tree.flatten(old, is_leaf=lambda node: node is not old)
    news, same = jax.tree.flatten(new, is_leaf=lambda node: node is not new)
    if structure != same or jax.tree_util.treedef_is_leaf(structure):
        return new
    return jax.tree.unflatten(structure, [_merge(*pair) for pair in zip(olds, news, strict=True)])


def posted(state: Any) -> dict[str, Any]:
    """What `state` offers to later links: `mu`, `nu`, `trace`, and the `count` and `b1` beside them.

    Looks into tuples, dicts and every NamedTuple whose name ends in `State`; where two offer the
    same name the later one counts, leaf by leaf if either is masked. A state with a method `posted`
    says itself what it offers.

    Args:
      state: the state of any gradient transformation.

    Returns:
      A dict from name to tree; a name that nobody offers is absent.

    >>> import jax.numpy as jnp
    >>> sorted(posted(optax.adam(1e-3).init({"w": jnp.ones(2)})))
    ['count', 'mu', 'nu']
    """
    found: dict[str, Any] = {}
    if isinstance(state, Posts):
        return state.posted()
    if holds_moments(state):
        fields = {k: v for k, v in state._asdict().items() if v is not None}
        if any(name in fields for name in _MOMENTS):
            found = {name: fields.pop(name) for name in (*_MOMENTS, *_BESIDE) if name in fields}
            if isinstance(found.get("b1"), PerParameter):
                found["b1"] = found["b1"].tree()
        children = list(fields.values())
    elif isinstance(state, Mapping):
        children = list(state.values())
    elif isinstance(state, (tuple, list)):
        children = list(state)
    else:
        return found
    for child in children:
        for name, value in posted(child).items():
            found[name] = _merge(found[name], value) if name in found else value
    return found


def _with_roads(
    combine: Callable[..., optax.GradientTransformationExtraArgs],
    links: Mapping[Any, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    transforms = {name: optax.with_extra_args_support(link) for name, link in links.items()}

    def update(
        updates: Tree, state: Any, params: Tree = None, **extra_args: Any
    ) -> tuple[Tree, Any]:
        board = {"grad": updates, **extra_args}

        def reading_and_posting(
            link: optax.GradientTransformationExtraArgs,
        ) -> optax.GradientTransformationExtraArgs:
            def link_update(
                updates: Tree, state: Any, params: Tree = None, **_: Any
            ) -> tuple[Tree, Any]:
                updates, state = link.update(updates, state, params, **board)
                board.update(posted(state))
                return updates, state

            return optax.GradientTransformationExtraArgs(link.init, link_update)

        wrapped = {name: reading_and_posting(link) for name, link in transforms.items()}
        return combine(wrapped).update(updates, state, params)

    return optax.GradientTransformationExtraArgs(combine(transforms).init, update)


def chain(*links: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.chain` that also hands each link the raw gradient and what earlier links remember.

    A drop-in: the state is the tuple that `optax.chain` makes, extra arguments given to `update`
    reach every link, and chains nest. An extra argument that the caller gives, `grad` for example,
    stands until a link posts its own. Any link may own moments, stock optax links included.

    Args:
      *links: gradient transformations, applied in order.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: a link is no gradient transformation.

    >>> import chainrule, jax.numpy as jnp, optax
    >>> tx = chainrule.chain(optax.scale_by_adam(), chainrule.transforms.cautious(), optax.scale(-1e-3))
    >>> params = {"w": jnp.ones(3)}
    >>> updates, state = tx.update({"w": jnp.array([1.0, -1.0, 0.0])}, tx.init(params), params)
    >>> updates["w"].round(5).tolist()
    [-0.0015..., 0.0015..., -0.0]
    """
    for i, link in enumerate(links):
        check_link("chain", f"links[{i}]", link)
    return _with_roads(lambda links: optax.chain(*links.values()), dict(enumerate(links)))


def named_chain(
    *links: tuple[str, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """`optax.named_chain` with the roads of `chain`: the state is a dict from the links' names to their states.

    Args:
      *links: pairs of a name and a gradient transformation; names are unique.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: two links have one name.
      TypeError: something is no pair of a name and a gradient transformation.

    >>> import jax.numpy as jnp
    >>> tx = named_chain(("adam", optax.scale_by_adam()), ("rate", optax.scale(-1e-3)))
    >>> list(tx.init(jnp.ones(2)))
    ['adam', 'rate']
    """
    for link in links:
        if not isinstance(link, tuple) or len(link) != 2 or not isinstance(link[0], str):
            raise TypeError(
                f"named_chain: `links` must be pairs of a name and a gradient transformation, got {link!r}"
            )
        check_link("named_chain", repr(link[0]), link[1])
    names = [name for name, _ in links]
    if len(names) != len(set(names)):
        raise ValueError(f"named_chain: names must be unique, got {names}")
    return _with_roads(lambda links: optax.named_chain(*links.items()), dict(links))
