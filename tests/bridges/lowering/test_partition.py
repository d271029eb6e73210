"""A program in pieces."""

import jax
import jax.numpy as jnp

from chainrule.bridges.lowering import lower, ops
from chainrule.bridges.lowering.layouts import Cut, Mesh
from chainrule.bridges.lowering.passes.partition import Piece, by_kind, is_apart
from chainrule.bridges.lowering.passes.shard import Sharding
from chainrule.bridges.lowering.pipeline import FRONT, SHARDED, back, run
from chainrule.bridges.lowering.step_program import StepProgram


def sharded_pieces(compiled: bool) -> list[list[Piece]]:
    """The stages of a step that scales each leaf by its mean, on the first of two ranks; leaves of three sizes."""
    shapes = [(40,), (60,), (82, 3)]
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def step(*given):
        params, grads, kept = given[:3], given[3:6], given[6:]
        means = [0.5 * k + jnp.mean(jnp.abs(g)) for k, g in zip(kept, grads, strict=True)]
        moved = [p - g / (m + 1) for p, g, m in zip(params, grads, means, strict=True)]
        return (*moved, *means)

    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    lowered = lower(step, *structs, *structs, *[scalar] * 3)
    mesh = Mesh((2,), (0,), ((0,), (1,)), ("dimension 0", "all"))
    axes = [(Cut(n, ((0, 2),)), *[None] * len(rest)) for n, *rest in shapes]
    sharding = Sharding(mesh, (*axes, *axes, *[()] * 3))
    program = run(SHARDED, StepProgram.of(lowered, (0, 1, 2, 6, 7, 8), sharding))
    program = run(FRONT, program)
    program = run(back(program, compiled)[0], program)
    return [list(stage) for stage in program.stages]


def test_a_collective_s_piece_holds_nothing_else():
    """What follows from its results runs with the leaf that they belong to, else op by op and leaf by leaf."""
    for compiled in (False, True):
        pieces = [piece for stage in sharded_pieces(compiled) for piece in stage]
        (apart,) = [p for p in pieces if any(map(is_apart, p.nodes))]
        first, *rest = apart.nodes
        assert first.target is ops.all_reduce
        assert all(n.args[0] is first for n in rest), [n.target for n in rest]


def test_leaves_of_all_sizes_share_the_code_behind_a_collective():
    (kind,) = by_kind(sharded_pieces(True)[-1])
    assert len(kind) == 3 and all(piece.updates for piece in kind)


def test_the_update_of_a_leaf_without_axes_is_no_part_of_what_unpacks_its_number():
    """With eight leaves or more; compiled, such a step could not be built."""
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (*8 * [(3,)], ())]

    def step(*params):
        numbers = jax.lax.cumsum(jnp.stack([jnp.sum(p) for p in params]))
        return tuple(p * numbers[i] for i, p in enumerate(params))

    for compiled in (False, True):
        program = run(FRONT, StepProgram.of(lower(step, *structs), tuple(range(len(structs)))))
        program = run(back(program, compiled)[0], program)
        pieces = [piece for stage in program.stages for piece in stage]
        (apart,) = [p for p in pieces if p.nodes[0].target is ops.unbind]
        assert all(n.args[0] is apart.nodes[0] for n in apart.nodes[1:]), apart.nodes


def test_a_constant_that_many_leaves_read_ties_them_together_on_a_cpu_only():
    """Such as the identity matrix of Newton-Schulz steps."""
    structs = [jax.ShapeDtypeStruct((3, 3), jnp.float32)] * 4

    def step(*params):
        return tuple(p @ (2.0 * jnp.eye(3) + p @ p) + jnp.eye(3) for p in params)

    for device, count in (("cpu", 1), ("meta", 4)):  # what is no CPU is taken for a GPU
        for compiled in (False, True):
            lowered = lower(step, *structs, device=device, compiled=compiled)
            program = run(FRONT, StepProgram.of(lowered, tuple(range(4))))
            program = run(back(program, compiled)[0], program)
            (stage,) = program.stages
            assert len(stage) == count
            assert len(list(by_kind(stage))) == 1
