"""The weights of a LLaMA model, under Megatron's names and under Hugging Face's.

Megatron packs what Hugging Face keeps apart: `linear_qkv` holds, for each group of queries, the
rows of its query heads, its key head and its value head; `linear_fc1` holds the gate and then the
up projection. Both sides rotate the first half of a head against the second, so rows are only
moved, and there and back they are the same bits. GPTModel stores one tensor for all layers,
HybridModel one for each of its own, two of which are a LLaMA layer: attention, then MLP.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

from tools.common.cli import ToolError

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
# The weights with a row for each token.
TABLES = {EMBEDDING: "model.embed_tokens.weight", OUTPUT: "lm_head.weight"}
# Modules of which Megatron or Transformer Engine stores an object beside the weights.
_WITH_OBJECT = (
    *("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"),
    *("mlp.linear_fc1", "mlp.linear_fc2"),
)
_MOST_NAMES = 5
_OBJECT = "._extra_state/"  # behind the module's name


class Llama(NamedTuple):
    """The sizes of a model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    """Key and value heads: as many as `heads`, or fewer."""
    head_dim: int
    vocab: int
    """Rows of the embedding; on Megatron's side, with the padding."""
    tied: bool
    """Embedding and output projection are one."""


class Form(NamedTuple):
    """How a Megatron model stores its weights."""

    hybrid: bool = False
    """As HybridModel in layers "*-*-...", not as GPTModel."""
    stacked: bool = True
    """One tensor for all layers."""
    norms_apart: bool = False
    """Norms are modules of their own, not parts of the linear layers that follow."""


FORMS = {
    "gpt": Form(),
    "hybrid": Form(hybrid=True, stacked=False),
    "hybrid-local": Form(hybrid=True, stacked=False, norms_apart=True),
}


class Packing(NamedTuple):
    """Parts whose rows are dealt out in groups: part 0 of group 0, part 1 of group 0, ..."""

    names: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    """Of each part."""
    groups: int = 1

    @property
    def size(self) -> tuple[int, ...]:
        """Size of the packed tensor."""
        return (sum(size[0] for size in self.sizes), *self.sizes[0][1:])

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Take a packed tensor apart."""
        rows = [size[0] // self.groups for size in self.sizes]
        parts = tensor.unflatten(0, (self.groups, -1)).split(rows, dim=1)
        return [part.flatten(0, 1) for part in parts]

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Undo `split`."""
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], 1).flatten(0, 1)


class Weight(NamedTuple):
    """One tensor of Megatron: a packing, of one layer or stacked over layers."""

    key: str
    prefixes: tuple[str, ...]
    """What stands before the names of the parts, for each layer."""
    packing: Packing
    stacked: bool = False

    @property
    def size(self) -> tuple[int, ...]:
        """Size of Megatron's tensor."""
        return (len(self.prefixes), *self.packing.size) if self.stacked else self.packing.size

    def parts(self) -> dict[str, tuple[int, ...]]:
        """Size by name of Hugging Face's tensors, in the order of `split`."""
        named = [*zip(self.packing.names, self.packing.sizes, strict=True)]
        return {before + name: size for before in self.prefixes for name, size in named}

    def split(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Take Megatron's tensor apart into Hugging Face's."""
        return {
            before + name: part
            for before, layer in zip(
                self.prefixes, tensor if self.stacked else [tensor], strict=True
            )
            for name, part in zip(self.packing.names, self.packing.split(layer), strict=True)
        }

    def join(self, find: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Make Megatron's tensor from Hugging Face's, which `find` gives by name."""
        layers = [
            self.packing.join([find(before + name) for name in self.packing.names])
            for before in self.prefixes
        ]
        return torch.stack(layers) if self.stacked else layers[0]


def weights(model: Llama, form: Form) -> list[Weight]:
    """List the tensors of a model in the order in which they are used."""
    size = (model.vocab, model.hidden)
    tables = [Weight(key, ("",), Packing((name,), (size,))) for key, name in TABLES.items()]
    final = "decoder.final_norm.weight" if form.hybrid else "decoder.final_layernorm.weight"
    norm = Weight(final, ("",), Packing(("model.norm.weight",), ((model.hidden,),)))
    return [tables[0], *_layer_weights(model, form), norm, *([] if model.tied else tables[1:])]


def _layer_weights(model: Llama, form: Form) -> Iterator[Weight]:
    prefixes = tuple(f"model.layers.{index}." for index in range(model.layers))
    for path, packing in _packings(model, form.norms_apart).items():
        if form.stacked:
            yield Weight(f"decoder.layers.{path}", prefixes, packing, stacked=True)
            continue
        for index, prefix in enumerate(prefixes):
            yield Weight(f"decoder.layers.{_index(path, index, form)}.{path}", (prefix,), packing)


def _index(path: str, layer: int, form: Form) -> int:
    """The number of a LLaMA layer's attention or MLP among Megatron's layers."""
    return 2 * layer + ("mlp" in path) if form.hybrid else layer


def _packings(model: Llama, norms_apart: bool) -> dict[str, Packing]:
    """What one layer holds, by the path in Megatron's."""
    names = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
    if norms_apart:
        names = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    hidden, ffn, norm = model.hidden, model.ffn, ((model.hidden,),)
    queries, keys = model.heads * model.head_dim, model.groups * model.head_dim
    attention = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
    sizes = ((queries, hidden), (keys, hidden), (keys, hidden))
    up = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    return {
        names[0]: Packing(("input_layernorm.weight",), norm),
        "self_attention.linear_qkv.weight": Packing(attention, sizes, model.groups),
        "self_attention.linear_proj.weight": Packing(
            ("self_attn.o_proj.weight",), ((hidden, queries),)
        ),
        names[1]: Packing(("post_attention_layernorm.weight",), norm),
        "mlp.linear_fc1.weight": Packing(up, ((ffn, hidden), (ffn, hidden))),
        "mlp.linear_fc2.weight": Packing(("mlp.down_proj.weight",), ((hidden, ffn),)),
    }


def progress(found: Sequence[Weight]) -> tqdm:
    """A bar that counts what is in weights."""
    total = sum(math.prod(weight.size) for weight in found)
    return tqdm(total=total, unit="weight", unit_scale=True, disable=None)


def form_of(keys: Collection[str], hybrid: bool) -> Form:
    """Recognise the form of a checkpoint by its keys."""
    stacked = not any(re.match(r"decoder\.layers\.\d+\.", key) for key in keys)
    return Form(hybrid, stacked, any(key.endswith("input_layernorm.weight") for key in keys))


def extra_states(model: Llama, form: Form) -> list[str]:
    """Name the objects that Megatron expects beside the weights, with Transformer Engine or not."""
    names = [f"decoder.final_{'norm' if form.hybrid else 'layernorm'}{_OBJECT}shard_0_1"]
    names += [f"output_layer{_OBJECT}shard_0_1"] if form.hybrid and not model.tied else []
    for path in _WITH_OBJECT:
        for layer in range(model.layers):
            if form.stacked:
                place = f"decoder.layers.{path}{_OBJECT}shard_{layer}_{model.layers}"
            else:
                place = f"decoder.layers.{_index(path, layer, form)}.{path}{_OBJECT}shard_0_1"
            names.append(place)
    return names


def check_layers(where: object, found: Mapping[str, tuple[int, ...]], model: Llama) -> None:
    """Refuse more layers than there are tensors for, before anything is listed for each.

    Args:
        where: the file or folder.
        found: size by Hugging Face's name.
        model: with the number of layers to check.

    Raises:
        ToolError: tensors are missing.
    """
    names = (re.match(r"model\.layers\.(\d+)\.", name) for name in found)
    numbered = len({match[1] for match in names if match})
    if model.layers > numbered:
        raise ToolError(
            f"{where}: missing tensors: of {model.layers} layers, at most {numbered} have weights"
        )


def check_names(
    where: object, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare the tensors of a file or folder with those of the model.

    Args:
        where: the file or folder.
        found: size by name.
        expected: likewise.

    Raises:
        ToolError: names are unknown or missing, or a size is another.
    """
    for kind, names in (
        ("unknown tensors", found.keys() - expected.keys()),
        ("missing tensors", expected.keys() - found.keys()),
    ):
        if names:
            shown = ", ".join(sorted(names)[:_MOST_NAMES])
            more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            raise ToolError(f"{where}: {kind} for a LLaMA model: {shown}{more}")
    for name, size in expected.items():
        if tuple(found[name]) != size:
            raise ToolError(f"{where}: {name} is {list(found[name])}; expected {list(size)}")
