"""`chainrule.plan`: against memory that was allocated, passes that are known, and real sizes of models."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from safetensors.torch import save_file

import chainrule
from chainrule import TorchBridge, chains, transforms
from chainrule.bridges.lowering import lower
from chainrule.bridges.lowering.traffic import traffic
from chainrule.bridges.step.description import describe
from chainrule.bridges.traffic import of_step
from chainrule.cli import main
from chainrule.expression import chain_of
from chainrule.models import structs_of
from chainrule.native.operations import operations_of
from chainrule.planning import plan
from registry import in_tiers

SHAPES = {"embedding": (300, 64), "block/kernel": (64, 256), "block/bias": (256,), "scale": ()}
CHAINS = {
    "optax.adamw": lambda: optax.adamw(1e-3),
    "optax.adafactor": lambda: optax.adafactor(1e-3),
    "stam": chains.stam,
    "stam_lite": chains.stam_lite,
    "casmo": chains.casmo,
    "casmo_snr": chains.casmo_snr,
    "magma": lambda: chains.magma(optax.adamw(1e-3)),
    "muon": chains.muon,
    "cosmic": chains.cosmic,
    "codes": lambda: transforms.quantized_state(optax.scale_by_adam(), bits=8, block=64),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(0)), optax.sgd(0.1)),
}


# ---- state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CHAINS)
def test_the_state_is_what_jax_allocates(name, dtype):
    params = {k: jnp.ones(shape, dtype) for k, shape in SHAPES.items()}
    state = CHAINS[name]().init(params)
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(state)
    ]
    found = plan(CHAINS[name](), SHAPES, dtype=dtype)
    assert found.state_bytes == sum(x.nbytes for x in leaves)
    assert sum(entry.tensors for entry in found.state) == len(leaves)
    assert found.parameter_bytes == sum(x.nbytes for x in params.values())


@pytest.mark.parametrize("name", ["optax.adamw", "stam", "casmo", "magma", "muon"])
def test_the_state_is_within_one_percent_of_what_the_bridge_holds(name):
    """It keeps a few scalars in other places than JAX does."""
    params = [(k, torch.nn.Parameter(torch.ones(shape))) for k, shape in SHAPES.items()]
    for _, p in params:
        p.grad = torch.ones_like(p)
    optimizer = TorchBridge(CHAINS[name](), params)
    optimizer.step()
    held = {t.untyped_storage() for entries in optimizer.state.values() for t in entries.values()}
    measured = sum({s.data_ptr(): s.nbytes() for s in held}.values())
    size = sum(p.nbytes for _, p in params)
    assert plan(CHAINS[name](), SHAPES).state_bytes == pytest.approx(measured, abs=0.01 * size)


def test_fields_have_the_names_of_their_links():
    entries = {(e.link, e.field): e for e in plan(chains.stam(), SHAPES).state}
    assert entries["adaptive_beta1", "mu"].tensors == entries["scale_by_adam", "nu"].tensors == 4
    assert entries["adaptive_beta1", "b1"].bytes == 4 * 4


# ---- a step ------------------------------------------------------------------------------------

N = 2**20
PASSES = {
    # The fused kernels' own: parameter, gradient and moments are read, all but the gradient written.
    "optax.sgd(0.1)": (2, 1),
    "optax.lion(1e-3)": (3, 2),
    "optax.adamw(1e-3)": (4, 3),
    # A norm of all gradients reads them once more; the residual's sums read gradient and first moment.
    "optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))": (5, 3),
    "chains.stam()": (6, 3),
    "chains.stam_lite()": (4, 2),
    # The moments' shares are summed while they are updated; then they and the parameter. One sum for all parameters.
    "chains.casmo()": (6, 3),
    # The cosine of gradient and first moment.
    "chains.magma(optax.adamw(1e-3))": (6, 3),
    # The kernel's tier 0: the mean magnitude of the gradient, then p - rate c sign(g) in place.
    "chains.cosmic()": (3, 1),
}


@pytest.mark.parametrize(
    ("text", "dtype"), [*((text, "float32") for text in PASSES), ("optax.adamw(1e-3)", "bfloat16")]
)
def test_a_step_moves_the_passes_that_it_must(text, dtype):
    found = plan(chain_of(text), {"a": (N,), "b": (2, N // 2)}, dtype=dtype)
    passes = np.array([found.read, found.written]) / found.parameter_bytes
    # Beside the tensors there are some numbers for each, and 500 samples of casmo's, of 2 N.
    np.testing.assert_allclose(passes, PASSES[text], rtol=0, atol=2e-3)
    assert found.exact


@pytest.mark.parametrize("text", ["chains.stam()", "chains.magma(optax.adamw(1e-3))"])
def test_statistics_and_step_of_many_leaves_are_passes_of_one_piece(text):
    """From nine parameters on a leaf's sums and its step are one piece: it reads what only the step needs once."""
    shapes = {f"{i}": jax.ShapeDtypeStruct((N // 8,), jnp.float32) for i in range(9)}
    found = of_step(describe(chain_of(text), shapes), (), [{} for _ in shapes])
    passes = np.array(found.stages) / (9 * N // 8 * 4)
    (busy,) = passes[passes.sum(axis=1) > 0.01]
    np.testing.assert_allclose(busy, (6, 3), rtol=0, atol=1e-3)


def test_what_no_piece_writes_in_place_is_copied():
    """Two tensors that change places: each is kept first, then copied."""
    aval = jax.ShapeDtypeStruct((N,), jnp.float32)
    found = traffic(lower(lambda a, b: (b, a), aval, aval), (0, 1))
    assert found.stages[-2] == (found.read, found.written) == (4 * 4 * N, 4 * 4 * N)


def test_operations_of_products():
    """Five steps of three products of 64 x 64 by 64 x 256, or 64 x 64, and a few passes over the entries."""
    tx = optax.chain(transforms.newton_schulz(gram=False), optax.scale(-1.0))
    found = plan(tx, {"w": (64, 256)})
    products = 5 * (2 * 2 * 64 * 64 * 256 + 2 * 64**3)
    assert products < found.operations < 1.2 * products


def test_operations_of_a_jaxpr_are_xla_s():
    def f(x, y):
        return jnp.sum(jnp.maximum(x @ y, 0) * 2 + 1)

    given = jnp.ones((32, 64)), jnp.ones((64, 16))
    ours = operations_of(jax.make_jaxpr(f)(*given).jaxpr, set())
    theirs = jax.jit(f).lower(*given).cost_analysis()["flops"]
    assert ours == pytest.approx(theirs, rel=0.01)


def test_what_is_not_counted_is_named():
    found = plan(chains.cosmic(), SHAPES)
    assert found.uncounted == ("branch",) and "without branch" in str(found)


def test_a_time_needs_a_bandwidth():
    assert plan(optax.sgd(0.1), {"w": (1000,)}).seconds is None
    found = plan(optax.sgd(0.1), {"w": (1000,)}, bandwidth=1e9)
    assert found.seconds == (found.read + found.written) / 1e9
    assert plan(chains.stam(), SHAPES, mesh="fsdp=2", bandwidth=1e9).seconds is None
    found = plan(chains.stam(), SHAPES, mesh="fsdp=2", bandwidth=1e9, network=1e6)
    assert found.seconds == pytest.approx((found.read + found.written) / 1e9 + found.sent / 1e6)


def test_without_torch_it_is_the_least_that_a_step_moves(monkeypatch):
    exact = plan(chains.stam(), {"w": (N,)})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = plan(chains.stam(), {"w": (N,)})
    assert not found.exact and "at least" in str(found)
    assert (found.read, found.written) == pytest.approx((4 * 4 * N, 3 * 4 * N), rel=1e-3)
    assert found.operations == pytest.approx(exact.operations, rel=0.25)


# ---- on a mesh -----------------------------------------------------------------------------------

BIG = {"embedding": (1024, 64), "kernel": (64, 256), "bias": (256,)}


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("optax.adamw(1e-3)", []),
        ("chains.stam()", ["all_reduce"]),
        ("chains.casmo()", ["all_reduce"]),
        ("chains.casmo_snr()", ["all_reduce"]),
        ("chains.magma(optax.adamw(1e-3))", ["all_reduce"]),
        ("optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))", ["all_reduce"]),
    ],
)
@pytest.mark.parametrize("mesh", ["fsdp=8", "dp=2,fsdp=4", "fsdp=4,tp=2"])
def test_collectives(text, kinds, mesh):
    """As docs/scaling.md says: none entry by entry; of sums a few numbers a tensor, in one."""
    found = plan(chain_of(text), BIG, mesh=mesh)
    assert [kind for kind, _, _ in found.collectives] == kinds
    assert found.sent <= 2 * 100 and found.devices == 8


@pytest.mark.parametrize(
    "text",
    [
        "chains.stam()",
        "chains.casmo()",
        "chains.magma(optax.adamw(1e-3))",
        "optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))",
    ],
)
def test_ranks_tell_each_other_less_than_a_kilobyte_of_ten_million_parameters(text):
    width, inner = 448, 1216
    layer = {
        **{f"attention/{name}": (width, width) for name in "qkvo"},
        "mlp/gate": (width, inner),
        "mlp/up": (width, inner),
        "mlp/down": (inner, width),
        "before": (width,),
        "between": (width,),
    }
    model = {f"{i}/{name}": shape for i in range(4) for name, shape in layer.items()}
    found = plan(chain_of(text), {"embedding": (1024, width), **model}, mesh="fsdp=8")
    assert found.parameters > 10e6
    ((kind, size, devices),) = found.collectives
    assert (kind, devices) == ("all_reduce", 8) and 0 < size < 1000


def test_the_gate_of_cosmic_is_measured_on_parts():
    """In two sums: the variance needs the mean. Nothing as large as a gradient is told."""
    for chain in (chains.cosmic(), in_tiers(chains.cosmic())):
        found = plan(chain, BIG, mesh="fsdp=8")
        assert [kind for kind, _, _ in found.collectives] == ["all_reduce"] * 2
        assert found.sent <= 2 * 100


def test_the_first_device_owns_muon_s_only_matrix():
    """It gets the others' seven eighths, and hands seven eighths back."""

    def routing(params):
        return {name: "muon" if name == "kernel" else "adam" for name in params}

    found = plan(chains.muon(routing=routing), BIG, mesh="fsdp=8")
    sizes = [size for kind, size, _ in found.collectives if kind == "exchange"]
    whole = 4 * 64 * 256
    assert sizes == [whole, whole // 8]
    assert found.sent == pytest.approx(whole * 7 / 8, rel=0.01)


@pytest.mark.parametrize(
    ("mesh", "share"),
    [("fsdp=8", 1 / 8), ("dp=8", 1), ("dp=2,fsdp=4", 1 / 4), ("fsdp=4,tp=2", None), ("tp=4", None)],
)
def test_a_device_has_its_part(mesh, share):
    alone, found = (plan(chains.adam(), BIG, mesh=m) for m in (None, mesh))
    if share is None:  # of matrices a part along both axes, of the vector along the first
        vector = {"fsdp=4,tp=2": 64, "tp=4": 256}[mesh]
        part = {"fsdp=4,tp=2": 8, "tp=4": 4}[mesh]
        entries = (1024 * 64 + 64 * 256) // part + vector
    else:
        entries = share * alone.parameters
    assert found.parameter_bytes == 4 * entries
    scalars = alone.state_bytes - 2 * alone.parameter_bytes
    assert found.state_bytes_here == 2 * found.parameter_bytes + scalars
    assert (found.read, found.written) == pytest.approx((16 * entries, 12 * entries), rel=0.01)


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "numbers"),
    [
        ("gpt2-small", 124_439_808),
        ("gpt2-xl", 1_557_611_200),
        ("llama-1b", 1_235_814_400),
        ("llama-8b", 8_030_261_248),
        ("llama-70b", 70_553_706_496),
    ],
)
def test_models_have_the_size_that_their_cards_say(model, numbers):
    assert sum(int(np.prod(s.shape)) for s in structs_of(model).values()) == numbers


def test_a_model_its_files_and_its_tree_are_one(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).to(torch.bfloat16)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    tree = {k: jax.ShapeDtypeStruct(v.shape, jnp.bfloat16) for k, v in model.state_dict().items()}
    files = tmp_path / "model.pt", str(tmp_path / "model.safetensors")
    for source in (model, *files):
        assert structs_of(source) == tree
    assert structs_of(model, "float32")["0.weight"].dtype == jnp.float32


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": "gpt3"}, r"'gpt3' is neither a file nor one of gpt2-small"),
        ({"params": {}}, r"`params` holds no parameters"),
        ({"params": {"w": "x"}}, r"`params` must hold arrays or shapes, got 'x'"),
        ({"mesh": "8"}, r'`mesh` must be like "dp=2,fsdp=8" or "fsdp=8,tp=4", got \'8\''),
        ({"mesh": "pp=2"}, r"`mesh` must be one of 'dp', 'fsdp', 'tp', got 'pp'"),
        ({"mesh": {"dp": 0}}, r"`mesh` has dp=0, expected at least 1"),
        ({"bandwidth": 0.0}, r"`bandwidth` must be greater than 0, got 0"),
        ({"network": -1.0}, r"`network` must be greater than 0, got -1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(optax.sgd(0.1), **{"params": {"w": (2,)}, **arguments})


def test_files_that_hold_no_state_dict_are_refused(tmp_path):
    cut, other = tmp_path / "cut.safetensors", tmp_path / "other.pt"
    cut.write_bytes(b"\x10\0\0")
    torch.save([1, 2], other)
    for path, message in ((cut, r"is no safetensors file"), (other, r"holds no state dict")):
        with pytest.raises(ValueError, match=message):
            plan(optax.sgd(0.1), path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chains.stamm()", r"chains has no public 'stamm'"),
        ("chains._live", r"has no public '_live'"),
        ("open('x')", r"`open` in .* is none of chainrule, chains, optax, transforms"),
        ("optax.losses()", r"is no function of chainrule or optax"),
        ("chains.stam(learning_rate=lambda n: n)", r"is no literal"),
        ("chains.stam(", r"is no expression"),
        ("chains.stam(*[1])", r"is no literal"),
        ("optax.global_norm", r"makes no chain"),
    ],
)
def test_expressions_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        chain_of(text)


# ---- the command ---------------------------------------------------------------------------------


def test_the_command(capsys, monkeypatch):
    chain = "optax.chain(optax.clip(1.0), chains.stam_lite(3e-4))"
    options = ["--mesh", "dp=2,fsdp=4", "--bandwidth", "50", "--network", "10"]
    monkeypatch.setattr("chainrule.models.MODELS", {"gpt2-small": lambda: BIG})
    assert main(["plan", chain, "gpt2-small", *options]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"adaptive_beta1\W+mu\W+3", shown) and re.search(r"all_reduce over \d", shown)
    assert "ms" in shown
    assert main(["plan", "chains.nothing()", "gpt2-small"]) == 2
    assert "chains has no public 'nothing'" in capsys.readouterr().err
    assert main(["plan", chain, "gpt2-small", "--bandwidth", "0"]) == 2


def test_it_is_found_in_the_package():
    assert chainrule.plan is plan and plan(optax.sgd(0.1), {"w": (2,)}).state == ()
