"""Shapes of well-known models, and those of a user's: a dictionary from name to shape and dtype, without memory."""

import json
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from chainrule.transforms._trees import path_name

Structs = dict[str, jax.ShapeDtypeStruct]
Shapes = dict[str, tuple[int, ...]]


def _gpt2(width: int, layers: int) -> Shapes:
    shapes: Shapes = {"wte.weight": (50257, width), "wpe.weight": (1024, width)}
    for i in range(layers):
        for name, size in (("attn.c_attn", 3), ("attn.c_proj", 1), ("mlp.c_fc", 4)):
            shapes |= {
                f"h.{i}.{name}.weight": (width, size * width),
                f"h.{i}.{name}.bias": (size * width,),
            }
        shapes |= {
            f"h.{i}.mlp.c_proj.weight": (4 * width, width),
            f"h.{i}.mlp.c_proj.bias": (width,),
        }
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (width,), f"h.{i}.{name}.bias": (width,)}
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def _llama(width: int, layers: int, hidden: int, keys: int, tied: bool = False) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (128256, width)}
    block: Shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (width,)
    return shapes if tied else shapes | {"lm_head.weight": (128256, width)}


MODELS: Mapping[str, Callable[[], Shapes]] = {
    "gpt2-small": lambda: _gpt2(768, 12),
    "gpt2-xl": lambda: _gpt2(1600, 48),
    "llama-1b": lambda: _llama(2048, 16, 8192, 512, tied=True),
    "llama-8b": lambda: _llama(4096, 32, 14336, 1024),
    "llama-70b": lambda: _llama(8192, 80, 28672, 1024),
}
"""Shapes by name, as Hugging Face names them: GPT-2, Llama 3.2 1B, Llama 3.1 8B and 70B."""


def structs_of(source: Any, dtype: Any = None) -> Structs:
    """The parameters that `source` stands for, by name.

    Args:
      source: a name in `MODELS`; the path of a state dict (`.safetensors`, or what `torch.load` reads); a torch model;
        or a pytree of arrays, `jax.ShapeDtypeStruct`s or shapes.
      dtype: of all that are floating point; default their own, float32 where there are only shapes.

    Raises:
      ValueError: there is no such model or file, or nothing in it.

    >>> structs_of({"dense": {"kernel": (4, 3)}})
    {'dense/kernel': ShapeDtypeStruct(shape=(4, 3), dtype=float32)}
    """
    found = _found(source)
    if not found:
        raise ValueError("plan: `params` holds no parameters")
    if dtype is None:
        return found
    return {
        name: jax.ShapeDtypeStruct(s.shape, jnp.dtype(dtype))
        if jnp.issubdtype(s.dtype, jnp.inexact)
        else s
        for name, s in found.items()
    }


def _found(source: Any) -> Structs:
    if isinstance(source, str) and source in MODELS:
        return {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in MODELS[source]().items()}
    if isinstance(source, (str, pathlib.Path)):
        return _of_file(pathlib.Path(source))
    if hasattr(source, "named_parameters"):
        source = dict(source.named_parameters())
    leaves = jax.tree_util.tree_leaves_with_path(source, is_leaf=_is_shape)
    return {path_name(path) or "parameter": _struct(leaf) for path, leaf in leaves}


def _is_shape(node: Any) -> bool:
    return type(node) is tuple and all(isinstance(n, int) for n in node)


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    if _is_shape(leaf):
        return jax.ShapeDtypeStruct(leaf, jnp.float32)
    if not hasattr(leaf, "shape"):
        raise ValueError(f"plan: `params` must hold arrays or shapes, got {leaf!r}")
    return jax.ShapeDtypeStruct(tuple(leaf.shape), jnp.dtype(str(leaf.dtype).rpartition(".")[2]))


_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def _of_file(path: pathlib.Path) -> Structs:
    if not path.is_file():
        raise ValueError(f"plan: {str(path)!r} is neither a file nor one of {', '.join(MODELS)}")
    if path.suffix == ".safetensors":
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except (struct.error, ValueError, OverflowError) as error:
            raise ValueError(f"plan: {str(path)!r} is no safetensors file: {error}") from None
        return {
            name: jax.ShapeDtypeStruct(
                tuple(entry["shape"]), jnp.dtype(_SAFETENSORS[entry["dtype"]])
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    import torch

    loaded = torch.load(path, map_location="meta", weights_only=True)
    if not isinstance(loaded, Mapping) or not any(
        isinstance(t, torch.Tensor) for t in loaded.values()
    ):
        raise ValueError(
            f"plan: {str(path)!r} holds no state dict, a mapping from names to tensors; give the part that is one"
        )
    return {name: _struct(t) for name, t in loaded.items() if isinstance(t, torch.Tensor)}
