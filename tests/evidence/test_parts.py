"""Data, models and probes that experiments share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import chainrule
from chainrule.evidence import data, models
from chainrule.evidence.experiments import e1_casmo_grokking as e1
from chainrule.evidence.experiments import e2_casmo_long_tail as e2
from chainrule.evidence.experiments import e9_noisy_instructions as e9
from chainrule.evidence.experiments import e11_recombination as e11
from chainrule.evidence.probes import folded, mean_metric, probed, ratio

RANDOM = np.random.default_rng(0)


def test_patches_are_a_convolution():
    x = RANDOM.normal(size=(2, 5, 6, 3)).astype(np.float32)
    kernel = RANDOM.normal(size=(3, 3, 3, 4)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    # 27 products of numbers about one, in float32.
    np.testing.assert_allclose(
        models.patches(x) @ kernel.reshape(27, 4), expected, atol=27 * 8 * 1.2e-7
    )


def test_pooling_takes_the_largest_and_drops_the_odd_row():
    x = jnp.arange(2 * 3 * 4.0).reshape(2, 3, 4, 1)
    assert models.pool(x)[..., 0].tolist() == [[[5, 7]], [[17, 19]]]


def test_looked_up_attention_is_attention():
    """E1 computes keys and values once for each token and place: the outputs are those of every example by itself."""
    p, width = 7, 8
    model = e1.Transformer(np.random.default_rng(0), p, width)
    pairs = np.array([[0, 3], [6, 6], [2, 1]], np.int32)

    def dense(layer, x):
        return x @ layer.kernel + layer.bias

    def one(a, b):
        x = np.stack([model.embedding[i] for i in (a, b, p)]) + model.positions
        q = dense(model.query, x[2]).reshape(e1.HEADS, -1)
        k, v = (dense(m, x).reshape(3, e1.HEADS, -1) for m in (model.key, model.value))
        scores = np.einsum("hd,thd->ht", q, k) / (width / e1.HEADS) ** 0.5
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        mixed = np.einsum("ht,thd->hd", weights, v).reshape(-1)
        x = x[2] + dense(model.out, mixed)
        return dense(model.output, x + dense(model.down, np.maximum(dense(model.up, x), 0)))

    expected = [one(*pair) for pair in pairs]
    np.testing.assert_allclose(model(jnp.asarray(pairs)), expected, rtol=1e-4, atol=1e-5)


def test_wrong_labels_are_wrong_and_as_many_as_said():
    labels = RANDOM.integers(10, size=20_000).astype(np.int32)
    wrong = data.wrong_labels(RANDOM, labels, 0.3, 10) != labels
    assert abs(wrong.mean() - 0.3) < 5 * (0.3 * 0.7 / 20_000) ** 0.5


def test_each_pass_of_the_batches_takes_a_row_once():
    rows = data.batches(RANDOM, np.arange(100, 110), 3, 7)
    assert rows.shape == (7, 3)
    for one_pass in (rows[:3], rows[3:6]):
        assert len(np.unique(one_pass)) == 9
    with pytest.raises(ValueError, match="fewer than one batch"):
        data.batches(RANDOM, np.arange(2), 3, 1)


def test_splits_are_disjoint():
    parts = data.split(RANDOM, 20, 5, 6)
    assert [len(part) for part in parts] == [9, 5, 6]
    assert sorted(np.concatenate(parts)) == list(range(20))


def test_the_tail_is_long_and_what_is_reported_balanced():
    labels = np.repeat(np.arange(10), 500)
    train, validation, test, order = e2.long_tailed(RANDOM, labels, 400)
    counts = np.bincount(labels[train], minlength=10)[order]
    assert (counts[0], counts[-1]) == (400, 4)
    assert (np.diff(counts) < 0).all()
    assert set(np.bincount(labels[test])) == {60}
    everything = np.concatenate([train, validation, test])
    assert len(np.unique(everything)) == len(everything)


def test_a_probe_measures_and_changes_nothing():
    params = {"w": jnp.array([3.0, 4.0])}
    tx = optax.chain(probed(optax.scale(0.25)), optax.scale(-1.0))
    updates, state = tx.update(params, tx.init(params))
    assert updates["w"].tolist() == [-0.75, -1.0]
    assert ratio(state)["ratio"] == 0.25


def test_a_matched_arm_keeps_the_decay_of_a_step():
    point = folded("c")({"learning_rate": 0.1, "weight_decay": 2.0}, {"c": np.array([0.2, 0.3])})
    assert point == pytest.approx({"learning_rate": 0.025, "weight_decay": 8.0})


def test_a_metric_of_each_tensor_is_averaged():
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    tx = chainrule.chains.casmo(granularity="parameter", tau_init_steps=5)
    _, state = tx.update(params, tx.init(params), params)
    assert mean_metric("confidence")(state)["confidence"] == 1.0


@pytest.mark.parametrize(("power", "factor"), [(0, 1.0), (1, 0.5), (-1, 2.0)])
def test_confidence_scales_the_decay_by_its_power(power, factor):
    """With noise in the moments the confidence is the least, here a half, and the decay that to the power."""
    link = e1.confident_decay(0.1, power, c_min=0.5)
    params, zeros = jnp.full(2, 3.0), jnp.zeros(2)
    moments = {"mu": jnp.zeros(2), "nu": jnp.ones(2), "count": jnp.int32(1)}
    updates, _ = link.update(zeros, link.init(params), params, **moments)
    np.testing.assert_allclose(updates, 0.3 * factor * np.ones(2), rtol=1e-6)


def test_instructions_have_the_answers_that_they_ask_for():
    """By another program than the one that made them."""
    lines = e9.instructions(np.random.default_rng(0), 500, 0.0)
    for line in lines:
        text = "".join(chr(code + 31) for code in line)
        prompt, answer = text[: e9.PROMPT].strip(), text[e9.PROMPT :].strip()
        kind, *words = prompt.rstrip("=").split()
        if kind in ("add", "sub"):
            wanted = str(eval("+-"["as".index(kind[0])].join(words)))
        elif kind == "get":
            wanted = words[1][words[1].index(words[0]) + 1]
        else:
            wanted = {"rev": "{2}{1}{0}", "rot": "{1}{2}{0}"}[kind].format(*words[0])
        assert answer == wanted, text


def test_as_many_instructions_as_said_have_another_answer():
    right, wrong = (e9.instructions(np.random.default_rng(1), 4000, share) for share in (0.0, 0.3))
    del right
    answers = wrong[:, e9.PROMPT :]
    checked = 0
    for line, answer in zip(wrong[::5], answers[::5], strict=True):  # of the kind "add"
        text = "".join(chr(code + 31) for code in line)
        _, a, b = text[: e9.PROMPT].strip().rstrip("=").split()
        checked += "".join(chr(code + 31) for code in answer).strip() != str(int(a) + int(b))
    assert abs(checked / 800 - 0.3) < 5 * (0.3 * 0.7 / 800) ** 0.5


def test_recombined_chains_are_new_and_as_many_as_said():
    found = e11.drawn()
    assert len(found) == e11.CHAINS >= 24
    assert {name for name, _ in found.values()} == set(e11.GRIDS)
    for _, parts in found.values():
        assert not e11.published(parts)
    assert e11.published(("", "agar", "", ""))  # CASMO
    assert e11.published(("", "", "cautious", "orthograd"))  # KerasOptimizers composes these
    assert not e11.published(("adaptive", "agar", "", ""))


@pytest.mark.parametrize("name", e11.GRIDS)
def test_a_direction_alone_is_the_optimizer_of_its_name(name):
    """With the fixed moment: Adam, sign descent with momentum, and Muon's matrices, of constant gradients."""
    params = {"hidden": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    grads = jax.tree.map(lambda p: jnp.asarray(RANDOM.normal(size=p.shape), p.dtype), params)
    tx = e11.direction(name, "")
    updates, state = tx.update(grads, tx.init(params), params)
    updates, _ = tx.update(grads, state, params)
    if name == "muon":
        left, _, right = np.linalg.svd(np.asarray(grads["hidden"]))
        # Five steps of the polynomial leave singular values in about [0.7, 1.2].
        assert np.abs(np.linalg.svd(updates["hidden"])[1] - 1).max() < 0.35
        assert (
            np.abs(
                left.T @ updates["hidden"] @ right.T
                - np.diag(np.diag(left.T @ updates["hidden"] @ right.T))
            ).max()
            < 1e-4
        )
    elif name == "rms":
        for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(u, g / np.sqrt(np.mean(np.square(g))), rtol=1e-5)
    else:
        jax.tree.map(
            lambda u, g: np.testing.assert_allclose(u, np.sign(g), rtol=1e-4), updates, grads
        )


def test_beside_a_link_the_updates_pass_and_it_sees_the_raw_gradient():
    tx = chainrule.chain(optax.scale(5.0), e11.beside(optax.trace(0.5)))
    g = jnp.array([1.0, -2.0])
    updates, state = tx.update(g, tx.init(g))
    assert updates.tolist() == [5.0, -10.0]
    assert state[1].trace.tolist() == [1.0, -2.0]
