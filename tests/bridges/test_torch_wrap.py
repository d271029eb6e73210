"""Links around optimizers of torch: the recorded Magma, what the links see, and whatever the base does goes on."""

import copy
import functools
import io
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from tests.golden.replay import assert_follows, cases, recording
from tests.golden.test_magma import FILES, MOMENTS
from torch import nn

import bounds
import chainrule
from chainrule import TorchBridge, TorchWrap, chains, transforms
from chainrule.bridges.torch_moments import decoded, moments_of

RATE = 0.01
SHAPES = {"w": (5, 3), "b": (3,), "head": (2, 3)}
Params = dict[str, nn.Parameter]

BASES: dict[str, Any] = {
    "adam": lambda p: torch.optim.Adam(p, RATE, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, RATE),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, RATE, foreach=True),
    "nadam": lambda p: torch.optim.NAdam(p, RATE),
    "sgd": lambda p: torch.optim.SGD(p, RATE),
    "momentum": lambda p: torch.optim.SGD(p, RATE, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, RATE, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, RATE),
}


def parameters(dtype: torch.dtype = torch.float32) -> Params:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def train(params: Params, optimizer: Any, steps: range = range(4)) -> None:
    for step in steps:
        for name, grad in gradients(step).items():
            params[name].grad = grad.to(params[name].dtype)
        optimizer.step()


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def doubled() -> Any:
    return optax.scale(2.0)


# ---- Magma ---------------------------------------------------------------------------------


def with_draws(mask: Any, draws: np.ndarray, names: list[str]) -> Any:
    """Magma's atom with the recorded draws."""
    table = jnp.asarray(draws, jnp.float32)

    def init(params: Any) -> Any:
        return jnp.zeros((), jnp.int32), mask.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        count, inner = state
        drawn = {name: table[count, i] for i, name in enumerate(names)}
        updates, inner = mask.update(updates, inner, params, mask=drawn, **extra)
        return updates, (count + 1, inner)

    return optax.GradientTransformationExtraArgs(init, update)


@pytest.mark.parametrize("case", cases(FILES))
def test_the_recorded_magma_around_torchs_own_optimizers(case: Any) -> None:
    rec, variant = recording(case.recording), case.variant
    spec = rec.variants[variant]
    params = {name: nn.Parameter(torch.from_numpy(np.array(p))) for name, p in rec.params.items()}
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    base = kind[spec["base"]](params.values(), **spec["base_kw"])
    moment = "mu" if moments_of(base) else "own"
    if spec["algo"] == "Magma pypi":
        moment = "own"
    elif spec.get("moment_key", "auto") != "auto":
        moment = MOMENTS[spec["moment_key"]]
    given = ("mask_prob", "tau", "alignment_ema", "momentum_beta")
    mask = transforms.momentum_alignment_mask(
        **{name: spec[name] for name in given if name in spec},
        moment=moment,
        exclude={name: name in spec["exclude"] for name in rec.names},
    )
    after = with_draws(mask, rec.log(variant, "mask"), rec.names)
    optimizer = TorchWrap(base, after=after, params=list(params.items()))
    grads = rec.gradients(variant)
    followed: dict[str, list[np.ndarray]] = {name: [] for name in rec.names}
    for step in range(rec.meta["T"]):
        for name, p in params.items():
            p.grad = torch.from_numpy(np.array(grads[name][step]))
        optimizer.step()
        for name, p in params.items():
            followed[name].append(p.detach().numpy().copy())
    assert_follows({name: np.stack(rows) for name, rows in followed.items()}, rec, variant)


# ---- what the links see, and what they do ---------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_links_that_do_nothing_leave_the_base_alone(name: str) -> None:
    alone, wrapped = parameters(), parameters()
    base = BASES[name](alone.values())
    optimizer = TorchWrap(BASES[name](wrapped.values()), optax.identity(), optax.identity())
    train(alone, base)
    train(wrapped, optimizer)
    assert_same(alone, wrapped)
    assert_same(list(base.state.values()), list(optimizer.state.values()))


def test_bfloat16_parameters_stay_as_the_base_made_them() -> None:
    alone, wrapped = parameters(torch.bfloat16), parameters(torch.bfloat16)
    train(alone, BASES["adamw"](alone.values()))
    train(wrapped, TorchWrap(BASES["adamw"](wrapped.values()), after=optax.identity()))
    assert_same(alone, wrapped)


def test_gradients_are_filtered_and_put_back() -> None:
    alone, wrapped = parameters(), parameters()
    base, optimizer = (
        BASES["momentum"](alone.values()),
        TorchWrap(BASES["momentum"](wrapped.values()), doubled()),
    )
    for step in range(3):
        grads = gradients(step)
        for name, grad in grads.items():
            alone[name].grad, wrapped[name].grad = 2 * grad, grad
        base.step()
        optimizer.step()
        assert all(wrapped[name].grad is grad for name, grad in grads.items())
        assert_same(grads, gradients(step))
    assert_same(alone, wrapped)


def in_jax(chain: Any, steps: int = 4) -> dict[str, np.ndarray]:
    params: Any = {name: jnp.asarray(p.detach().numpy()) for name, p in parameters().items()}
    state = chain.init(params)
    for step in range(steps):
        grads = {name: jnp.asarray(g.numpy()) for name, g in gradients(step).items()}
        updates, state = chain.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return {name: np.asarray(p) for name, p in params.items()}


AFTER: dict[str, Any] = {
    "cautious": lambda: transforms.cautious(negated=True),
    "magma": lambda: transforms.momentum_alignment_mask(seed=3),
    "agar, own": lambda: transforms.agar_confidence(2, source="own"),
    "agar": lambda: transforms.agar_confidence(2),
    "clip": lambda: optax.clip(RATE / 2),
}


@pytest.mark.parametrize("name", AFTER)
def test_links_after_adam_are_those_of_a_chain(name: str) -> None:
    """Where the change is compared with zero or clipped, its rounding moves nothing by more than itself."""
    params = parameters()
    train(
        params,
        TorchWrap(
            torch.optim.Adam(params.values(), RATE), after=AFTER[name](), params=params.items()
        ),
    )
    expected = in_jax(chainrule.chain(optax.adam(RATE), AFTER[name]()))
    alone = in_jax(optax.adam(RATE))
    differs = [np.abs(expected[key] - alone[key]).max() for key in alone]
    assert max(differs) > 1e-3 * RATE, "the link does nothing here"
    for key, p in params.items():
        bound = bounds.of_adam(RATE, 4) + 4 * bounds.gamma(4) * np.abs(expected[key]).max()
        np.testing.assert_allclose(p.detach(), expected[key], rtol=0, atol=bound)


def test_grokfast_and_orthograd_before_sgd_are_those_of_a_chain() -> None:
    params = parameters()
    before = chainrule.chain(transforms.orthograd(), transforms.grokfast_ema())
    train(params, TorchWrap(torch.optim.SGD(params.values(), RATE), before))
    expected = in_jax(chains.orthograd(chains.grokfast(optax.sgd(RATE))))
    for name, p in params.items():
        np.testing.assert_allclose(
            p.detach(),
            expected[name],
            rtol=0,
            atol=bounds.stepped(4) * np.abs(expected[name]).max(),
        )


def showing(name: str) -> Any:
    """A link that writes what it is given by a name into the change."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        shown = extra[name]
        return jax.tree.map(lambda u: shown + 0 * u, updates) if name == "count" else shown, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


@pytest.mark.parametrize(
    ("base", "name", "key"),
    [
        ("adam", "mu", "exp_avg"), ("adamw", "nu", "exp_avg_sq"), ("adamw", "count", "step"),
        ("momentum", "mu", "momentum_buffer"), ("momentum", "trace", "momentum_buffer"),
        ("rmsprop", "nu", "square_avg"), ("rmsprop", "mu", "grad_avg"),
        ("adagrad", "nu", "sum"),
    ],
)  # fmt: skip
def test_links_are_given_the_moments_of_the_base(base: str, name: str, key: str) -> None:
    params = parameters()
    more = {"moments": {"nu": "sum"}} if base == "adagrad" else {}
    optimizer = TorchWrap(BASES[base](params.values()), after=showing(name), **more)
    train(params, optimizer, range(2))
    before = copy.deepcopy(params)
    train(params, optimizer, range(2, 3))
    for label, p in params.items():
        assert_same(p.detach(), before[label].detach() + optimizer.state[p][key])


def test_the_codes_of_bitsandbytes() -> None:
    table = torch.linspace(-1, 1, 256)
    codes = torch.randint(
        256, (3, 200), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    scales = torch.tensor([2.0, 3.0, 0.5])  # 600 numbers in blocks of 256
    expected = torch.cat(
        [table[c.long()] * s for c, s in zip(codes.flatten().split(256), scales, strict=True)]
    )
    assert_same(decoded(codes, table, scales), expected.reshape(3, 200))


# ---- what the base does goes on -------------------------------------------------------------


def wrapped(params: Params) -> TorchWrap:
    before = functools.partial(transforms.grokfast_ema, 0.9)
    after = functools.partial(transforms.momentum_alignment_mask, 0.5)
    return TorchWrap(torch.optim.AdamW(params.values(), RATE), before, after)


def test_saved_pickled_and_copied_it_goes_on_bit_for_bit() -> None:
    whole = parameters()
    train(whole, wrapped(whole), range(8))
    params = parameters()
    optimizer = wrapped(params)
    train(params, optimizer)
    pairs = [pickle.loads(pickle.dumps((params, optimizer))), copy.deepcopy((params, optimizer))]
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    fresh = copy.deepcopy(params)
    resumed = wrapped(fresh)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for other, restored in [*pairs, (fresh, resumed)]:
        train(other, restored, range(4, 8))
        assert_same(other, whole)


def test_a_pickle_needs_a_function_that_makes_the_links() -> None:
    with pytest.raises(pickle.PicklingError, match="function that returns the chain"):
        pickle.dumps(TorchWrap(BASES["sgd"](parameters().values()), optax.scale(2.0)))


def test_a_scheduler_acts_on_the_base() -> None:
    alone, around = parameters(), parameters()
    optimizers = (
        BASES["adam"](alone.values()),
        TorchWrap(BASES["adam"](around.values()), after=optax.identity()),
    )
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in optimizers]
    for step in range(3):
        for params, optimizer, scheduler in zip(
            (alone, around), optimizers, schedulers, strict=True
        ):
            train(params, optimizer, range(step, step + 1))
            scheduler.step()
    assert optimizers[1].param_groups[0]["lr"] == RATE / 8
    assert optimizers[1].param_groups is optimizers[1].base.param_groups
    assert_same(alone, around)


def test_live_numbers_of_the_links_are_keys_of_their_groups() -> None:
    params, expected = parameters(), parameters()
    optimizer = TorchWrap(BASES["sgd"](params.values()), chains.grokfast(optax.identity()))
    assert optimizer.before is not None
    optimizer.before.param_groups[0]["lamb"] = 0.0
    assert "lr" not in optimizer.before.param_groups[0]
    train(params, optimizer)
    train(expected, BASES["sgd"](expected.values()))
    assert_same(params, expected)


def test_parameters_without_a_gradient_keep_their_values_and_state() -> None:
    params = parameters()
    optimizer = wrapped(params)
    train(params, optimizer)
    before = copy.deepcopy(optimizer.state_dict()["state"][1]), params["b"].detach().clone()
    for name, grad in gradients(5).items():
        params[name].grad = None if name == "b" else grad
    optimizer.step()
    assert_same((optimizer.state_dict()["state"][1], params["b"].detach()), before)
    assert params["b"].grad is None
    for p in params.values():
        p.grad = None
    optimizer.step()


def test_groups_may_be_added() -> None:
    params, apart = parameters(), parameters()
    optimizer, expected = wrapped({"w": params["w"]}), wrapped({"w": apart["w"]})
    optimizer.add_param_group({"params": [params["b"]], "lr": 1.0})
    expected.base.add_param_group({"params": [apart["b"]], "lr": 1.0})  # followed at the next step
    for p, o in ((params, optimizer), (apart, expected)):
        del p["head"]
        for step in range(3):
            for name in p:
                p[name].grad = gradients(step)[name]
            o.step()
    assert_same(params, apart)
    assert not torch.equal(params["b"], parameters()["b"])
    with pytest.raises(TypeError, match="complex"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 2
    train(params, optimizer, range(0))


def test_a_closure_is_called_once_before_the_links() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = TorchWrap(torch.optim.SGD([weight], 0.25), optax.scale(0.5))
    calls: list[bool] = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        weight.grad = None
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    assert calls == [True]
    assert weight.tolist() == [0.75, -1.5]


# ---- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: TorchWrap(chains.adam(), optax.identity()), TypeError, "`base` must be an optimizer of torch"),
        (lambda p: TorchWrap(torch.optim.SGD(p, 0.1)), ValueError, "give links `before`"),
        (lambda p: TorchWrap(torch.optim.LBFGS(p), optax.identity()), ValueError, "LBFGS evaluates the model"),
        (lambda p: TorchWrap(torch.optim.SGD(p, 0.1), after=transforms.momentum_alignment_mask()), ValueError, "`mu`"),
        (lambda p: TorchWrap(torch.optim.SGD(p, 0.1), optax.identity(), moments={"m": "x"}), ValueError, "got 'm'"),
        (lambda p: TorchWrap(torch.optim.SGD(p, 0.1), optax.identity(), params=[]), ValueError, "must name every"),
        (lambda p: TorchWrap(torch.optim.SGD(p, 0.1), optax.sgd), TypeError, "learning_rate"),
    ],
)  # fmt: skip
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make([nn.Parameter(torch.ones(2, 2))])


def unchanged(optimizer: TorchWrap, params: Params) -> Any:
    return copy.deepcopy((optimizer.state_dict(), {name: p.detach() for name, p in params.items()}))


def test_a_sparse_gradient_is_refused_before_anything_is_written() -> None:
    params = parameters()
    optimizer = wrapped(params)
    train(params, optimizer)
    before = unchanged(optimizer, params)
    params["head"].grad = gradients(0)["head"].to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same(unchanged(optimizer, params), before)
    train(params, optimizer)


def test_a_moment_that_the_base_does_not_keep_puts_the_parameters_back() -> None:
    params = parameters()
    optimizer = TorchWrap(
        BASES["adam"](params.values()), after=showing("mu"), moments={"mu": "average"}
    )
    with pytest.raises(
        RuntimeError, match=r"`average` of Adam, which is 'mu' of the links.* got none"
    ):
        train(params, optimizer, range(1))
    assert_same(params, parameters())


def test_a_moment_that_only_a_step_with_a_loss_reads_is_given_then() -> None:
    def update(updates: Any, state: Any, params: Any = None, **given: Any) -> Any:
        del params
        if "value" in given:
            updates = jax.tree.map(lambda mu: given["value"] * mu, given["mu"])
        return updates, state

    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    weight.grad = torch.tensor([4.0, 8.0])
    base = torch.optim.SGD([weight], 0.25, momentum=0.5)
    links = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    wrap = TorchWrap(base, after=links)
    wrap.step()
    assert weight.tolist() == [0.0, -4.0]
    wrap.step(lambda: torch.tensor(1.0))  # the momentum is 1.5 times the gradient
    assert weight.tolist() == [6.0, 8.0]


def test_a_moment_that_no_link_reads_is_not_asked_for() -> None:
    params = parameters()
    base = torch.optim.AdamW(params.values(), RATE)
    links = transforms.momentum_alignment_mask()
    wrap = TorchWrap(base, after=links, moments={"nu": "not there"})
    train(params, wrap)
    assert wrap.metrics()["after"]["mask_rate"].isfinite()


@pytest.mark.parametrize(
    "broken", ["before.ema", "after.alignment", "base groups", "another chain", "none"]
)
def test_a_state_dict_that_does_not_fit_changes_nothing(broken: str) -> None:
    params = parameters()
    optimizer = wrapped(params)
    train(params, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    train(params, optimizer)
    if broken == "base groups":
        saved["param_groups"][0]["params"].pop()
    elif broken == "another chain":
        saved = TorchBridge(chains.adam(), parameters().values()).state_dict()
    elif broken == "none":
        saved = {"state": {}}
    else:
        key = next(k for k in saved["state"][0] if k.startswith(broken))
        del saved["state"][0][key]
    before = unchanged(optimizer, params)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(saved)
    assert_same(unchanged(optimizer, params), before)
    train(params, optimizer)


@pytest.mark.slow
def test_compiled_links_are_the_eager_ones() -> None:
    eager, compiled = parameters(), parameters()
    for params, compile in ((eager, False), (compiled, True)):
        base = torch.optim.AdamW(params.values(), RATE)
        links = transforms.grokfast_ema(), transforms.momentum_alignment_mask()
        train(params, TorchWrap(base, *links, compile=compile))
    for name, p in eager.items():
        torch.testing.assert_close(
            p, compiled[name], rtol=bounds.stepped(4), atol=bounds.of_adam(RATE, 4)
        )
