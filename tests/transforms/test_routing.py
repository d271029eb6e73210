"""Which leaf goes where, why, and the plan that says so."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from chainrule import JsonFormatter
from chainrule.transforms import HIDDEN_MATRICES, Routing

TREE = {
    "blocks": [{"Bias_table": jnp.ones((3, 3)), "kernel": jnp.ones((3, 4)), "scale": jnp.ones(3)}],
    "embedding": {"table": jnp.ones((9, 4))},
    "head": {"kernel": jnp.ones((4, 9))},
    "stack": jnp.ones((2, 3, 4)),
}


def labels(routing, tree=TREE):
    return {r.path: r.label for r in routing.plan(tree).routes}


def reasons(routing, tree=TREE):
    return {r.path: r.reason for r in routing.plan(tree).routes}


def test_the_default():
    assert labels(HIDDEN_MATRICES) == {
        "blocks/0/Bias_table": "adam",
        "blocks/0/kernel": "muon",
        "blocks/0/scale": "adam",
        "embedding/table": "adam",
        "head/kernel": "adam",
        "stack": "muon",
    }
    assert reasons(HIDDEN_MATRICES)["head/kernel"] == "an output layer, by 'head'"
    assert reasons(HIDDEN_MATRICES)["blocks/0/Bias_table"] == "'bias' in the path"
    assert reasons(HIDDEN_MATRICES)["blocks/0/scale"] == "fewer than two axes"


def test_a_tree_of_labels_for_partition():
    assert jax.tree.structure(HIDDEN_MATRICES(TREE)) == jax.tree.structure(TREE)
    assert HIDDEN_MATRICES(TREE)["stack"] == "muon"


def test_patterns_are_searched_in_the_path_and_mind_the_case():
    routing = Routing(exclude=["^head", r"0/kernel$"])
    assert labels(routing)["head/kernel"] == "adam"
    assert reasons(routing)["blocks/0/kernel"] == "excluded"
    assert labels(routing)["stack"] == "muon"
    with pytest.raises(ValueError, match=r"pattern 'Head' matches none of the leaves .*'stack'"):
        labels(Routing(exclude="Head"))


def test_exclude_may_be_a_function_or_a_tree():
    assert labels(Routing(exclude=lambda path, leaf: leaf.ndim > 2))["stack"] == "adam"
    chosen = {"blocks": False, "embedding": False, "head": True, "stack": False}
    assert labels(Routing(exclude=chosen))["head/kernel"] == "adam"


def test_words_may_occur_nowhere():
    assert labels(Routing(words=("bias",)))["embedding/table"] == "muon"
    assert labels(Routing(words=("bias", "embedding")))["head/kernel"] == "muon"  # Keras' rule
    assert labels(Routing(words=("gamma",)))["blocks/0/Bias_table"] == "muon"


def test_labels_come_first_and_none_leaves_it_to_the_rules():
    given = {"blocks": None, "embedding": "muon", "head": "adam", "stack": None}
    for routing in (Routing(labels=given), Routing(labels=lambda tree: given)):
        assert labels(routing)["embedding/table"] == "muon"
        assert reasons(routing)["head/kernel"] == "labelled"
        assert labels(routing)["blocks/0/kernel"] == "muon"
        assert labels(routing)["blocks/0/scale"] == "adam"
    with pytest.raises(ValueError, match=r"`labels` must be 'muon', 'adam' or None, got 'sgd'"):
        labels(Routing(labels={**given, "stack": "sgd"}))


def test_holes_masked_leaves_and_tuples():
    tree = ({"a": None, "b": optax.MaskedNode(), "c": jnp.ones((2, 2))}, (jnp.ones(2),))
    assert labels(HIDDEN_MATRICES, tree) == {"0/c": "muon", "1/0": "adam"}
    assert labels(Routing(labels=("adam", None)), tree) == {"0/c": "adam", "1/0": "adam"}
    assert jax.tree.structure(HIDDEN_MATRICES(tree)) == jax.tree.structure(tree)


def test_the_plan_prints_every_leaf_with_its_route_and_reason():
    lines = str(Routing(exclude="^head").plan(TREE)).splitlines()
    assert lines[0].split() == ["leaf", "shape", "route", "reason"]
    assert len(lines) == 1 + len(jax.tree.leaves(TREE))
    assert "head/kernel          (4, 9)     adam   excluded" in lines
    assert "(the tree)" in str(HIDDEN_MATRICES.plan(np.ones((2, 2))))


EMBEDDINGS = {
    "transformers": (
        "transformer.wte.weight transformer.wpe.weight model.embed_tokens.weight embeddings.word_embeddings.weight "
        "bert.embeddings.position_embeddings.weight bert.embeddings.token_type_embeddings.weight shared.weight "
        "model.shared.weight model.decoder.embed_positions.weight gpt_neox.embed_in.weight backbone.embeddings.weight "
        "vit.embeddings.patch_embeddings.projection.weight transformer.word_embedding.weight "
        "text_model.embeddings.token_embedding.weight"
    ),
    "Llama, RWKV, nanoGPT": "tok_embeddings.weight emb.weight embed.weight value_embeds.0.weight",
    "timm, torchvision": "patch_embed.proj.weight pos_embed encoder.pos_embedding",
    "flax, MaxText, Haiku, Keras": (
        "params/Embed_0/embedding params/token_embedder/embedding params/PatchEmbed_0/kernel embed/embeddings "
        "token_embedding/embeddings params/decoder/posemb/kernel embedder/input_embedding"
    ),
}  # fmt: skip
OUTPUTS = {
    "transformers": (
        "lm_head.weight classifier.weight score.weight qa_outputs.weight embed_out.weight proj_out.weight "
        "cls.predictions.decoder.weight cls.seq_relationship.weight "
        "vocab_projector.weight transformer.output_layer.weight classifier.out_proj.weight lm_loss.weight "
        "classification_head.dense.weight v_head.summary.weight"
    ),
    "Llama, RWKV, fairseq": "output.weight head.weight output_projection.weight _orig_mod.output.weight",
    "timm, torchvision": (
        "head.weight head.fc.weight fc.weight module.fc.weight classifier.1.weight heads.head.weight head_dist.weight "
        "last_linear.weight"
    ),
    "flax, MaxText, Haiku, Keras": (
        "params/lm_head/kernel params/head/kernel params/logits_dense/kernel predictions/kernel params/head_0/kernel "
        "params/output_projection/kernel"
    ),
}  # fmt: skip
HIDDEN = {
    "transformers": (
        "transformer.h.0.attn.c_attn.weight transformer.h.0.mlp.c_fc.weight model.layers.3.self_attn.q_proj.weight "
        "model.layers.3.mlp.gate_proj.weight bert.encoder.layer.0.attention.self.query.weight "
        "bert.encoder.layer.0.attention.output.dense.weight bert.encoder.layer.0.output.dense.weight "
        "encoder.block.0.layer.0.SelfAttention.q.weight cls.predictions.transform.dense.weight "
        "wav2vec2.encoder.layers.0.feed_forward.output_dense.weight"
    ),
    "heads of attention": (
        "attention.heads.0.proj.weight blocks.0.sa.heads.0.key.weight blocks.1.attn.head.weight "
        "layers.0.multi_head.q.weight multi_head.q.weight MultiHeadDotProductAttention_0/query/kernel"
    ),
    "timm, torchvision": (
        "blocks.0.attn.qkv.weight blocks.0.attn.proj.weight blocks.0.mlp.fc1.weight layer1.0.conv1.weight "
        "layer4.1.se.fc.weight stages.0.blocks.0.conv_dw.weight"
    ),
    "flax, diffusers, detection": (
        "params/Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel params/Dense_0/kernel "
        "residual_layers.0.output_projection.weight transformer_blocks.0.proj_out.weight "
        "bbox_head.cls_convs.0.conv.weight encoder.output.dense.weight 0.weight shared_expert.weight"
    ),
}  # fmt: skip


@pytest.mark.parametrize("names", EMBEDDINGS.values(), ids=EMBEDDINGS.keys())
def test_embeddings_by_the_names_of_the_libraries(names):
    found = labels(HIDDEN_MATRICES, {name: jnp.ones((3, 2)) for name in names.split()})
    assert {name for name, label in found.items() if label != "adam"} == set()


@pytest.mark.parametrize("names", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_output_layers_by_the_names_of_the_libraries(names):
    found = labels(HIDDEN_MATRICES, {name: jnp.ones((3, 2)) for name in names.split()})
    assert {name for name, label in found.items() if label != "adam"} == set()


@pytest.mark.parametrize("names", HIDDEN.values(), ids=HIDDEN.keys())
def test_hidden_layers_are_not_taken_for_them(names):
    found = labels(HIDDEN_MATRICES, {name: jnp.ones((3, 2)) for name in names.split()})
    assert {name for name, label in found.items() if label != "muon"} == set()


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_vocabulary_is_known_by_its_size():
    block = {"up": struct(768, 3072), "down": struct(3072, 768)}
    tree = {
        "a": struct(50257, 768),
        "b": struct(768, 50257),
        "c": struct(50257),
        "blocks": [block] * 2,
    }
    found = reasons(HIDDEN_MATRICES, tree)
    assert found["a"] == found["b"] == "vocabulary-shaped, by 50257"
    assert labels(HIDDEN_MATRICES, tree)["blocks/0/up"] == "muon"
    assert labels(Routing(words=("bias",)), tree)["a"] == "muon"


@pytest.mark.parametrize(
    "tree",
    [
        {"a": struct(8191, 64)},  # too small for a vocabulary
        {"a": struct(32000, 4096), "up": struct(4096, 11008)},  # not far enough from the others
        {str(i): struct(65536, 1024) for i in range(3)},  # the wide layers of T5-11b
        {"a": struct(50257, 768, 3)},  # not a matrix
    ],
    ids=["small", "near", "thrice", "three axes"],
)  # fmt: skip
def test_what_might_be_hidden_is_no_vocabulary(tree):
    assert set(labels(HIDDEN_MATRICES, tree).values()) == {"muon"}


def test_parameters_of_torch_have_a_plan():
    layer = torch.nn.Linear(2, 3)
    plan = HIDDEN_MATRICES.plan({f"lm_head.{n}": p for n, p in layer.named_parameters()})
    assert [(r.path, r.shape, r.label) for r in plan.routes] == [
        ("lm_head.bias", (3,), "adam"),
        ("lm_head.weight", (3, 2), "adam"),
    ]


def test_a_plan_is_logged_once_with_every_leaf(caplog):
    tree = {"test_a_plan_is_logged": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    HIDDEN_MATRICES(tree)  # not while nobody listens
    with caplog.at_level(logging.INFO, "chainrule.routing"):
        for _ in range(3):
            HIDDEN_MATRICES(tree)
    (record,) = [r for r in caplog.records if r.name == "chainrule.routing"]
    assert str(HIDDEN_MATRICES.plan(tree)) in record.getMessage()
    line = json.loads(JsonFormatter().format(record))
    assert (line["event"], line["muon"], line["adam"]) == ("routing", 1, 1)
    assert {route["path"] for route in line["routes"]} == set(tree)
