"""Which leaves of a network's tree are embeddings or output layers, told by their names and shapes.

The names are those of transformers, timm, torchvision, fairseq, Megatron, nanoGPT, RWKV, flax, MaxText, Haiku and
Keras. A name counts in a leaf's own name, its module's and the module's above (`patch_embed.proj.weight`), since deeper
modules of an embedder or a head are hidden layers.
"""

import re
from collections import Counter
from collections.abc import Sequence

EMBEDDING_WORDS = ("emb", "embs", "embed", "embeds", "embedding", "embeddings", "embedder", "wte", "wpe")  # fmt: skip
"""A part of the path whose words (at underscores and capitals) include or end in one of these: `embed_tokens`,
`tok_embeddings`, `pos_embed`, `unembed`, `PatchEmbed_0`, `wte`."""

HEAD_NAMES = (
    *("head", "head_dist", "classifier", "score", "logits", "logits_dense", "to_logits"),
    *("predictions", "qa_outputs", "vocab_projector", "lm_loss", "seq_relationship"),
)
"""A part of the path that is one of these, or ends in `_head` (`lm_head`, `v_head`, `classification_head`), outside
attention and numbered blocks: `attention.heads.0.proj` and `layers.0.head.weight` are hidden."""

TOP_NAMES = (
    *("fc", "out", "output", "out_proj", "output_layer", "output_projection", "proj_out"),
    *("last_linear", "decoder", "shared"),
)
"""Names that are common within blocks too, so that they count for a module of the model itself alone: torchvision's
`fc`, Llama's `output`, Whisper's `proj_out`, T5's `shared`."""

_WRAPPERS = (
    *("module", "_orig_mod", "_fsdp_wrapped_module", "params", "model", "transformer", "backbone"),
    *("base_model", "net", "network"),
)

VOCABULARY, FACTOR = 8192, 4
"""A vocabulary has at least so many entries, and so many times any other dimension of the tree's matrices."""


def _snake(part: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", part).lower()


def named_like(path: str) -> str | None:
    """Why the slash- or dot-joined `path` names an embedding or an output layer; `None`: it does not.

    >>> named_like("transformer.wte.weight"), named_like("params/lm_head/kernel")
    ("an embedding, by 'wte'", "an output layer, by 'lm_head'")
    >>> named_like("blocks.0.attn.heads.0.proj.weight"), named_like("encoder.output.dense.weight")
    (None, None)
    """
    parts = [part for part in re.split(r"[./]", path) if part]
    snakes = [_snake(part) for part in parts]
    near = [i for i, part in enumerate(parts) if not part.isdigit()][-3:]
    for i in near:
        if any(word.endswith(EMBEDDING_WORDS) for word in snakes[i].split("_")):
            return f"an embedding, by {parts[i]!r}"
    for i in near:
        if _is_head(snakes[i]) and not any(map(_is_within, range(i), snakes)):
            return f"an output layer, by {parts[i]!r}"
    top = list(snakes)
    while len(top) > 1 and top[0] in _WRAPPERS:
        top.pop(0)
    if len(top) in (1, 2) and top[0] in TOP_NAMES:
        kind = "an embedding" if top[0] == "shared" else "an output layer"
        return f"{kind}, by {parts[-len(top)]!r} at the top"
    return None


def _is_head(part: str) -> bool:
    part = re.sub(r"_\d+$", "", part)
    of_attention = re.match(r"(multi|attn|attention|per|self)_?head", part)
    return part in HEAD_NAMES or (part.endswith("_head") and not of_attention)


def _is_within(place: int, part: str) -> bool:
    """Whether what lies below `part` is a hidden layer: in attention, or in a block with a number (`layers.0`,
    `Block_0`; a number in front is a place in a sequence of modules)."""
    block = re.fullmatch(r"\d+" if place else "", part) or re.fullmatch(r".*_\d+", part)
    return block is not None or "attn" in part or "attention" in part


def vocabulary(shapes: Sequence[tuple[int, ...]]) -> int | None:
    """The dimension that must be a vocabulary, by the shapes of all leaves: one of 8192 at least, in one or two
    matrices (an embedding and an untied output layer), and at least four times any other dimension of a leaf of two or
    more axes. `None`: there is no such dimension.

    >>> vocabulary([(50257, 768), (768, 3072), (3072, 768), (768,)]), vocabulary([(16384, 2048), (2048, 2048)] * 3)
    (50257, None)
    """
    matrices = [shape for shape in shapes if len(shape) > 1]
    longest = max((max(shape) for shape in matrices), default=0)
    others = [n for shape in matrices for n in shape if n != longest]
    uses = Counter(n for shape in matrices for n in set(shape))[longest]
    if longest >= max(VOCABULARY, FACTOR * max(others, default=1)) and uses <= 2:
        return longest
    return None
