"""The two ways a lowered program updates its inputs, against running it plainly and copying."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bounds
from chainrule import TorchBridge, chains
from chainrule.bridges.lowering import lower, to_torch
from chainrule.bridges.lowering.backends import foreach, parts
from chainrule.bridges.lowering.nodes import value_of
from chainrule.bridges.lowering.passes import rematerialise as rematerialisation
from chainrule.bridges.lowering.passes.infer_values import infer_values
from chainrule.bridges.lowering.passes.partition import by_kind, partition
from chainrule.bridges.lowering.passes.rematerialise import rematerialise
from chainrule.bridges.lowering.pipeline import make_step, run
from chainrule.bridges.lowering.step_program import StepProgram
from chainrule.native import _kernel

needs_kernel = pytest.mark.skipif(_kernel is None, reason="needs the compiled kernel")

SHAPES = {"bias": (3,), "kernel": (4, 3), "scale": (), "twin": (4, 3)}
CASES = {
    "adamw": lambda: optax.adamw(1e-2),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
    "galore": lambda: optax.contrib.galore(1e-2),
    "lion": lambda: optax.lion(1e-2),
    "noisy_sgd": lambda: optax.noisy_sgd(1e-2, key=jax.random.key(1)),
    "stam": lambda: chains.stam(1e-2),
    "casmo": lambda: chains.casmo(1e-2),
}


def program(make, **options):
    """A step lowered, where its outputs go, and its first inputs."""
    tx = optax.with_extra_args_support(make())
    rng = jax.random.split(jax.random.key(0), len(SHAPES))
    params = {n: jax.random.normal(k, s) for (n, s), k in zip(SHAPES.items(), rng, strict=True)}
    state = tx.init(params)

    def step(params, grads, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    n, m = len(SHAPES), len(jax.tree.leaves(state))
    inputs = [to_torch(x) for x in jax.tree.leaves((params, params, state))]
    targets = [*range(n), *range(2 * n, 2 * n + m)]
    return lower(step, params, params, state, **options), targets, inputs


def assert_same_steps(make, **options):
    lowered, targets, inputs = program(make)
    step = make_step(lowered, targets, **options)
    ours, plain = [x.clone() for x in inputs], [x.clone() for x in inputs]
    for _ in range(3):
        step(ours)
        for target, result in zip(targets, [r.clone() for r in lowered(*plain)], strict=True):
            plain[target] = result
    for a, b in zip(ours, plain, strict=True):
        size = float(b.abs().max()) if b.is_floating_point() and b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=bounds.stepped(3) * size)


@pytest.fixture
def torch_alone(monkeypatch):
    """The compiled kernel has no part."""
    monkeypatch.setattr(foreach, "_kernel", None)


@pytest.mark.parametrize("part", [1 << 18, 5, 1])
@pytest.mark.parametrize("name", CASES)
def test_batched_over_leaves(name, part, torch_alone, monkeypatch):
    monkeypatch.setattr(parts, "PART", part)
    assert_same_steps(CASES[name])


OTHERS = {
    "magma": lambda: chains.magma(optax.adamw(1e-2)),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "cautious": lambda: chains.adam(1e-2, caution="clamped_mean"),
    "lamb": lambda: optax.lamb(1e-2),
    "rprop": lambda: optax.rprop(1e-2),
}


@pytest.mark.parametrize("name", [*CASES, *OTHERS])
def test_in_the_kernel(name):
    assert_same_steps({**CASES, **OTHERS}[name])


def test_numbers_in_the_program_are_told_apart():
    """A literal from an input, whatever the input's position, from other literals, and 0 from -0."""
    x, k = jax.ShapeDtypeStruct((5,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)

    def step(x, k, y):
        zeros = jnp.where(y > 0, 0.0, -0.0)
        return (x * k + 1.0) / 2.0, k, 1.0 / zeros

    inputs = [torch.ones(5), torch.tensor(8.0), torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0])]
    make_step(lower(step, x, k, x), (0, 1, 2))(inputs)
    inf = float("inf")
    assert inputs[0].tolist() == [4.5] * 5 and inputs[2].tolist() == [inf, -inf, inf, -inf, inf]


@needs_kernel
@pytest.mark.parametrize("name", ["stam", "magma", "cautious"])
def test_the_calls_of_torch_are_as_many_for_any_number_of_leaves(name, monkeypatch):
    makes = {**CASES, **OTHERS}
    made = []
    for leaves in (9, 20):
        monkeypatch.setattr(
            sys.modules[__name__], "SHAPES", {f"{i}": (4, 3) for i in range(leaves)}
        )
        lowered, targets, inputs = program(makes[name])
        step = make_step(lowered, targets).ready()
        with Calls(every=True) as calls:
            step(inputs)
        made.append(len([name for name in calls.names if name != "empty_like"]))
    assert made[0] == made[1]


@needs_kernel
@pytest.mark.parametrize("large", [False, True])
def test_what_is_large_is_not_carried_but_computed_again(large, monkeypatch):
    if large:
        monkeypatch.setattr(rematerialisation, "_FROM_THE_SYSTEM", 1)
    lowered, targets, inputs = program(OTHERS["cautious"])
    step = make_step(lowered, targets).ready()
    with Calls(every=True) as calls:
        step(inputs)
    arrays = [shape for shape in SHAPES.values() if shape]
    assert calls.names.count("empty_like") == (0 if large else len(arrays))
    assert_same_steps(OTHERS["cautious"])


@needs_kernel
def test_a_tensor_that_is_summed_and_scaled_is_two_programs():
    """Each reads what is in memory, and writes it; torch has no part in it but to hold the sums."""
    aval = jax.ShapeDtypeStruct((40, 3), jnp.float32)

    def scaled(p, g, shown):
        kept = jnp.where(g > 0, p, 0.0)
        mean = jnp.sum(kept) / kept.size
        return p - kept / (1 + jnp.abs(mean)), g, mean

    lowered = lower(scaled, aval, aval, jax.ShapeDtypeStruct((), jnp.float32))
    step = make_step(lowered, (0, 1, 2)).ready()
    generator = np.random.default_rng(0)
    p, g = generator.normal(size=(2, 40, 3)).astype(np.float32)
    inputs = [torch.tensor(p), torch.tensor(g), torch.tensor(0.0)]
    with Calls(every=True) as calls:
        step(inputs)
    assert not calls.names
    kept = np.where(g > 0, p, 0.0).astype(np.float64)
    mean_error = bounds.summed(kept.size) * np.abs(kept).mean()
    assert abs(inputs[2] - kept.mean()) <= mean_error
    wanted = p - kept / (1 + abs(kept.mean()))
    error = bounds.ELEMENTWISE * (np.abs(p) + np.abs(kept)) + mean_error * np.abs(kept)
    assert (np.abs(inputs[0].numpy() - wanted) <= error).all()


@needs_kernel
def test_results_go_into_what_they_replace_though_nobody_reads_that():
    aval = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    step = make_step(lower(lambda a, b: (2 * b, b), aval, aval), (0, 1)).ready()
    inputs = [torch.full((4, 3), torch.nan), torch.ones(4, 3)]
    with Calls(every=True) as calls:
        step(inputs)
    assert not calls.names and inputs[0].tolist() == [[2.0] * 3] * 4


def test_parts_make_what_another_piece_reads(torch_alone, monkeypatch):
    monkeypatch.setattr(parts, "PART", 4)
    aval = jax.ShapeDtypeStruct((3, 4), jnp.float32)

    def sorted_beside(a, b, c):
        return jnp.sort(a * b - 1, axis=0), a * b - 1, 2 * c

    lowered = lower(sorted_beside, aval, aval, aval)
    inputs = [torch.randn(3, 4) for _ in range(3)]
    expected = [x.clone() for x in lowered(*inputs)]
    make_step(lowered, (0, 1, 2))(inputs)
    for got, want in zip(inputs, expected, strict=True):
        torch.testing.assert_close(got, want, **bounds.of_normals())


def test_a_tensor_of_one_element_is_broadcast_to_all_parts(torch_alone, monkeypatch):
    monkeypatch.setattr(parts, "PART", 5)
    aval, one = jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.float32)
    lowered = lower(lambda f, x, g: (f * 2, x - g * f, g + 1), one, aval, aval)
    inputs = [torch.full((1, 1), 3.0), torch.randn(3, 4), torch.randn(3, 4)]
    expected = [x.clone() for x in lowered(*inputs)]
    make_step(lowered, (0, 1, 2))(inputs)
    for got, want in zip(inputs, expected, strict=True):
        torch.testing.assert_close(got, want, **bounds.of_normals())


def test_zeros_for_what_is_not_finite_are_one_pass(torch_alone):
    aval = jax.ShapeDtypeStruct((5,), jnp.float32)
    lowered = lower(lambda g, _: (g, jnp.where(jnp.isfinite(g), g, 0.0)), aval, aval)
    step = make_step(lowered, (0, 1)).ready()
    inputs = [torch.tensor([torch.nan, -torch.inf, torch.inf, -3.0, 1e38]), torch.ones(5)]
    with torch.profiler.profile() as profile:
        step(inputs)
    assert inputs[1].tolist() == [0.0, 0.0, 0.0, -3.0, torch.tensor(1e38).item()]
    called = {event.key for event in profile.key_averages()}
    assert "aten::nan_to_num" in called and not called & {"aten::where", "aten::isfinite"}


def as_given():
    return torch.randn(3, 4)


def transposed():
    return torch.randn(4, 3).t()


def with_gaps():
    return torch.randn(3, 8)[:, ::2]


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("first", [as_given, transposed, with_gaps])
@pytest.mark.parametrize("second", [as_given, transposed, with_gaps])
def test_tensors_of_any_strides(first, second, kernel, monkeypatch):
    monkeypatch.setattr(parts, "PART", 5)
    if not kernel:
        monkeypatch.setattr(foreach, "_kernel", None)
    aval = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    # a * b - 1 is carried to a piece that is not elementwise.
    lowered = lower(lambda a, b: (a + 2 * b, jnp.sort(a * b - 1, axis=0)), aval, aval)
    inputs = [first(), second()]
    expected = [x.clone() for x in lowered(*inputs)]
    make_step(lowered, (0, 1))(inputs)
    for got, want in zip(inputs, expected, strict=True):
        torch.testing.assert_close(got, want, **bounds.of_normals())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiled(name):
    assert_same_steps(CASES[name], compile=True)


@pytest.mark.slow
def test_compiled_with_tensors_of_any_strides():
    params = [torch.nn.Parameter(torch.randn(4, 3).t()), torch.nn.Parameter(torch.randn(5, 2))]
    grads = [torch.randn(3, 4), torch.randn(2, 5).t()]
    plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for group, compile in ((params, True), (plain, False)):
        for p, g in zip(group, grads, strict=True):
            p.grad = g
        optimizer = TorchBridge(optax.adamw(1e-2), group, compile=compile)
        optimizer.step()
        optimizer.step()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, **bounds.of_normals())


class Calls(TorchDispatchMode):
    """The batched operations that run inside, or every one."""

    def __init__(self, every=False):
        super().__init__()
        self.every = every
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if self.every or (name.startswith("_foreach") and name != "_foreach_copy_"):
            self.names.append(name.removeprefix("_foreach_"))
        return func(*args, **(kwargs or {}))


TORCH_ADAMW = ["lerp_", "mul_", "addcmul_", "div", "sqrt_", "add_", "mul_", "addcdiv_"]
"""The passes of `torch.optim.AdamW(foreach=True)`: one fresh list of tensors, the denominators."""


@pytest.mark.parametrize("make", [lambda: optax.adamw(1e-3), lambda: chains.adam(1e-3, eps=1e-8)])
def test_adamw_makes_the_passes_of_torch(make, torch_alone):
    params = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = TorchBridge(make(), params)
    optimizer.step()
    with Calls() as calls:
        optimizer.step()
    live_eps_root = [] if len(calls.names) == len(TORCH_ADAMW) else ["add_"]
    assert calls.names == [*TORCH_ADAMW[:4], *live_eps_root, *TORCH_ADAMW[4:]]


@pytest.mark.parametrize("name", ["casmo", "magma"])
def test_no_tensor_is_carried_between_stages(name):
    makes = {**CASES, "magma": lambda: chains.magma(optax.adamw(1e-2))}
    lowered, targets, _ = program(makes[name], compiled=True)
    passes = (infer_values, rematerialise, partition)
    stages = run(passes, StepProgram.of(lowered, targets)).stages
    shape = SHAPES["kernel"]
    pieces = [p for stage in stages for p in stage]
    pieces = [p for p in pieces if any(value_of(n).shape == shape for n in p.inputs)]
    sums, steps = pieces[:2], pieces[2:]
    assert [len(p.updates) for p in pieces] == [0, 0, 3, 3]  # parameter and both moments at the end
    for piece in (*sums, *steps):
        tensors = [n for n in piece.inputs if value_of(n).ndim > 0]
        assert all(n.op == "placeholder" for n in tensors)


@pytest.mark.parametrize("compile", [False, True])
def test_statistics_that_wait_for_the_draws_of_their_step(monkeypatch, compile):
    """From nine leaves on each has its own scalars, and a statistic is a piece with the step that also reads a draw."""
    monkeypatch.setattr(sys.modules[__name__], "SHAPES", {f"{i}": (4, 3) for i in range(9)})
    assert_same_steps(lambda: chains.magma(optax.adamw(1e-2)), compile=compile)


def test_alike_leaves_are_one_kind():
    lowered, targets, _ = program(CASES["adamw"])
    stages = run((infer_values, partition), StepProgram.of(lowered, targets)).stages
    kinds = [[len(kind) for kind in by_kind(stage)] for stage in stages]
    assert kinds[-1] == [3]  # bias, kernel and twin; the scalar belongs to what is shared


@pytest.mark.parametrize("compile", [False, True])
def test_pieces_of_none_one_and_many_elements_that_begin_with_one_element(compile):
    """The number that a mean divides by is that of the whole piece, not of its first array, which has one element."""
    sizes = (0, 1, 2, 64, 32)
    vectors = [jnp.arange(n, dtype=jnp.float32) for n in sizes]
    singles = [jnp.full((1,), i, jnp.float32) for i, _ in enumerate(sizes)]

    def shifted(singles, vectors):
        return [x + jnp.mean(2 * q + x) for q, x in zip(singles, vectors, strict=True)]

    inputs = [to_torch(x) for x in (*singles, *vectors)]
    targets = range(len(singles), len(inputs))
    make_step(lower(shifted, singles, vectors), targets, compile=compile)(inputs)
    for i, (n, found) in enumerate(zip(sizes, inputs[len(singles) :], strict=True)):
        x = np.arange(n)  # integers, and means over powers of two: exact in any order
        assert found.tolist() == (x + 2 * i + (n - 1) / 2).tolist()


def test_what_is_updated_may_be_an_input_elsewhere():
    aval = jax.ShapeDtypeStruct((3,), jnp.float32)
    lowered = lower(lambda a, b: (b, a + b), aval, aval)
    a, b = torch.ones(3), torch.full((3,), 2.0)
    make_step(lowered, (0, 1))([a, b])
    assert a.tolist() == [2.0] * 3 and b.tolist() == [3.0] * 3


MATRIX = jax.ShapeDtypeStruct((3, 3), jnp.float32)


def plus_its_transpose(g, mu):
    x = 2 * g
    return x + x.T, mu


def read_through_a_view_later(g, mu):
    x = 2 * g
    view, y = x.T, x + 1
    return y - view, mu


def state_read_through_a_view(g, mu):
    view, new = mu.T, 0.9 * mu + 0.1 * g
    return new - view, new


def over_stages(g, mu):
    rows, new = mu.reshape(-1), 0.9 * mu + 0.1 * g
    norm = jnp.sqrt(jnp.sum(new**2) + jnp.sum(g**2))
    return (rows / norm).reshape(g.shape), new


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "function",
    [plus_its_transpose, read_through_a_view_later, state_read_through_a_view, over_stages],
)
def test_a_view_is_read_before_what_it_shows_is_written(function, compile):
    lowered = lower(function, MATRIX, MATRIX)
    inputs = [torch.randn(3, 3), torch.randn(3, 3)]
    expected = [x.clone() for x in lowered(*inputs)]
    make_step(lowered, (0, 1), compile=compile)(inputs)
    for got, want in zip(inputs, expected, strict=True):
        torch.testing.assert_close(got, want, **bounds.of_normals())
