"""Moves between tiers and gates are logged with their numbers, and a formatter makes JSON of them."""

import json
import logging
import sys

import jax.numpy as jnp
import pytest
import torch

import chainrule
from chainrule import JsonFormatter, TierPolicy, TorchBridge
from chainrule.chains import cosmic

POLICY = TierPolicy({2: 0.5, 1: 0.5}, reassignment_interval=2)


class Lines(logging.Handler):
    """Keeps what it is given, formatted."""

    def __init__(self):
        super().__init__()
        self.lines: list[dict] = []
        self.setFormatter(JsonFormatter())

    def emit(self, record):
        text = self.format(record)
        assert "\n" not in text
        self.lines.append(json.loads(text))


@pytest.fixture
def lines():
    logger, handler = logging.getLogger("chainrule"), Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_moves_are_logged_with_the_bytes_of_state(lines):
    tx = cosmic(policy=POLICY)
    params = {"a": jnp.ones(8), "b": jnp.ones(4)}
    grads = {"a": 9 * jnp.ones(8), "b": jnp.ones(4)}
    before = tx.init(params)
    after = chainrule.retier(before, grads, params)
    (line,) = lines
    assert (line["event"], line["logger"]) == ("tier_transition", "chainrule.tiers")
    assert (line["step"], line["promotions"], line["demotions"]) == (1, 2, 0)
    assert (line["tier0"], line["tier1"], line["tier2"]) == (0, 1, 1)
    # Tier 2 of eight float32: two moments and a count; tier 1: a magnitude and a count.
    assert line["state_bytes"] - line["state_bytes_before"] == (2 * 8 * 4 + 4) + (4 + 4)
    chainrule.retier(after, grads, params)
    assert len(lines) == 1


def test_the_bridge_logs_the_gate_when_it_moves(lines):
    weight = torch.nn.Parameter(torch.ones(64))
    chain = cosmic(gate_warmup_steps=0, gate_update_interval=1, gate_tier_max=2, policy=POLICY)
    bridge = TorchBridge(chain, [weight])
    scales = []
    for spike in (1.0, 1.0, 1.0, 100.0, 1.0):
        weight.grad = torch.ones(64)
        weight.grad[0] = spike
        bridge.step()
        scales.append(float(bridge.metrics()["gate_scale"]))
    events = [line for line in lines if line["event"] == "gate"]
    moved = [(t + 1, s) for t, s in enumerate(scales) if s != ([1.0, *scales])[t]]
    assert moved and [(e["step"], e["gate_scale"]) for e in events] == moved
    assert all(e["group"] == 0 and e["logger"] == "chainrule.gate" for e in events)


def test_an_exception_is_part_of_the_line():
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "it %s", ("broke",), sys.exc_info())
    line = json.loads(JsonFormatter().format(record))
    assert line["event"] == "it broke" and "ValueError: why" in line["exception"]
