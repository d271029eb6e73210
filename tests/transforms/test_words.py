"""A call that does not fit a chain or atom says what to write instead."""

import inspect

import optax
import pytest

from chainrule import chains, transforms
from chainrule.transforms._words import OTHER_WORDS, suggestion
from registry import ATOMS, CASES, CHAINS

FUNCTIONS = list({case.public: case.name for case in CASES}.items())
WORDED = [
    pytest.param(function, id=f"{function.__module__}.{function.__name__}")
    for function, _ in FUNCTIONS
    if function not in (transforms.chain, transforms.named_chain)  # any number of links, no words
]
LINK = optax.identity()


@pytest.mark.parametrize("function", WORDED)
def test_a_word_that_nothing_resembles_lists_the_arguments(function):
    names = list(inspect.signature(function).parameters)
    message = rf"^{function.__name__}: no argument `xyz`; it takes `{names[0]}`(.*`{names[-1]}`)?$"
    with pytest.raises(TypeError, match=message):
        function(xyz=1)


@pytest.mark.parametrize("function", WORDED)
def test_a_slip_of_the_pen_is_mended(function):
    name = max(inspect.signature(function).parameters, key=len)
    message = rf"^{function.__name__}: no argument `{name}x`; did you mean `{name}`\?$"
    with pytest.raises(TypeError, match=message):
        function(**{f"{name}x": 1})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chains.adam(lr=0.1), r"adam: no argument `lr`; did you mean `learning_rate`\?"),
        (lambda: chains.cosmic(lr=0.1), r"cosmic: no argument `lr`; did you mean `learning_rate`"),
        (lambda: chains.adam(betas=(0.9, 0.99)), r"adam: .*`betas`; did you mean `b1` and `b2`\?"),
        (lambda: chains.stam(betas=(0.9, 0.99)), r"stam: .* did you mean `b1_base` and `b2`\?"),
        (lambda: chains.stam_lite(betas=(0.9, 0.9)), r"stam_lite: .* did you mean `b1_base`\?"),
        (lambda: chains.nadam(beta_1=0.9), r"nadam: no argument `beta_1`; did you mean `b1`\?"),
        (lambda: chains.muon(momentum=0.9), r"muon: no argument `momentum`; did you mean `beta`\?"),
        (lambda: chains.muon(betas=(0.9, 0.9)), r"muon: .* did you mean `adam_b1` and `adam_b2`\?"),
        (
            lambda: chains.muon(exclude_layers=["head"]),
            r"muon: .*`exclude_layers`; did you mean `routing` \(a `Routing\(exclude=\.\.\.\)`\)\?",
        ),
        (lambda: chains.magma(LINK, exclude_params=()), r"magma: .* did you mean `exclude`\?"),
        (lambda: chains.casmo(wd=0.1), r"casmo: no argument `wd`; did you mean `weight_decay`\?"),
        (lambda: chains.casmo(epsilon=0.1), r"casmo: .* did you mean `eps`\?"),
        (lambda: chains.grokfast(optimizer=LINK), r"grokfast: .*; did you mean `inner`\?"),
        (lambda: chains.magma(), r"magma: needs `inner`$"),
        (lambda: transforms.decoupled_weight_decay(), r"decay: needs `weight_decay`$"),
        (lambda: chains.adam(0.1, learning_rate=0.2), r"adam: `learning_rate` is given twice"),
        (
            lambda: transforms.grokfast_ema(0.9, 2.0),
            r"grokfast_ema: takes `alpha` by position, got 2 arguments; give by name .* `lamb`",
        ),
        (lambda: transforms.snr_confidence(0.5), r"snr_confidence: takes nothing by position"),
        (lambda: transforms.scale_by_adam(beta2=0.9), r"scale_by_adam: .* did you mean `b2`\?"),
    ],
)
def test_the_words_of_other_libraries(call, message):
    with pytest.raises(TypeError, match=message) as caught:
        call()
    assert caught.value.__suppress_context__  # no text of `inspect` above it


def test_a_fifth_number_by_position_is_refused():
    """It is `eps_root` in optax and was `weight_decay` here."""
    message = r"adam: takes `learning_rate`, `b1`, `b2` by position, got 5 arguments; .*`eps`"
    with pytest.raises(TypeError, match=message):
        chains.adam(0.1, 0.9, 0.999, 1e-8, 0.0)


@pytest.mark.parametrize("case", CHAINS, ids=[case.name for case in CHAINS])
def test_a_chain_takes_the_rate_and_the_betas_by_position(case):
    parameters = inspect.signature(case.public).parameters.values()
    places = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    allowed = (["learning_rate", "b1", "b2"], ["learning_rate", "b1_base", "b2"], ["inner"])
    assert any(places == names[: len(places)] for names in allowed), places


@pytest.mark.parametrize("case", ATOMS, ids=[case.name for case in ATOMS])
def test_an_atom_takes_by_position_what_optax_does(case):
    """Where optax has the atom, its order of the arguments; else nothing that could be mixed up with another."""
    order = {
        "scale_by_adam": ["b1", "b2", "eps", "eps_root"],
        "scale_by_belief": ["b1", "b2", "eps", "eps_root"],
        "scale_by_tensor_rms": ["decay", "eps"],  # optax.scale_by_rms
        "ema_momentum": ["decay", "nesterov"],  # optax.trace
        "decoupled_weight_decay": ["weight_decay", "mask"],  # optax.add_decayed_weights
        "newton_schulz": ["coefficients", "steps"],  # optax.contrib.scale_by_muon
        "quantized_state": ["inner", "bits", "block"],  # as `quantize`; `bits` is 4 or 8
        "tiered_state": ["tiers", "policy"],
    }
    parameters = inspect.signature(case.public).parameters.values()
    places = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    expected = order.get(case.public.__name__)
    assert len(places) < 2 if expected is None else places == expected[: len(places)]


def test_every_word_of_the_table_leads_somewhere():
    names = [list(inspect.signature(function).parameters) for function, _ in FUNCTIONS]
    for word in OTHER_WORDS:
        assert any(suggestion(word, arguments) for arguments in names if word not in arguments), (
            word
        )


def test_a_type_error_of_the_body_is_not_about_words():
    with pytest.raises(TypeError, match=r"`steps` must be an integer"):
        transforms.newton_schulz(steps=2.5)
