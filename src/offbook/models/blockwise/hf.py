"""Language models from local folders in three common layouts: GPT-2, GPT-NeoX and Llama.

A folder holds `config.json` and `model.safetensors`, or `model.safetensors.index.json` and the files it names. Both are
read here, without the library that wrote them. A setting that the backbone does not have is refused, not passed over:
a model that is nearly the right one gives numbers that are nearly right.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019); Black et al., "GPT-NeoX-20B"
(2022); Touvron et al., "LLaMA" (2023); Llama team, "The Llama 3 Herd of Models" (2024).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from offbook.errors import CheckpointError, ConfigError, nearest
from offbook.models.blockwise.backbone import Backbone
from offbook.models.blockwise.config import BackboneConfig
from offbook.models.blockwise.masks import Causal, Mask
from offbook.models.blockwise.positions import RopeStretch
from offbook.runs.checkpoint import TensorInfo, read_tensor_infos

_MAX_JSON_BYTES = 32 * 2**20
_MAX_SIZE = 2**24
_FLOATS = ("F64", "F32", "F16", "BF16")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# How memory is spent and numbers are dropped; the rest of a configuration is the model's own.
_FREE = {"dropout", "attention_dropout", "remat", "segment", "offload", "block_q", "block_k", "block_ffn"}

# Settings that change nothing of what a causal model computes from tokens.
_IGNORED = re.compile(
    r"_.*|(bos|cls|decoder_start|eos|pad|sep)_token_id|(output|summary)_.*|architectures|classifier_dropout|(torch_)?dtype"
    r"|finetuning_task|gradient_checkpointing|id2label|initializer_range|is_decoder|keys_to_ignore_at_inference|label2id"
    r"|max_length|max_position_embeddings|n_ctx|name_or_path|num_labels|prefix|pretraining_tp|problem_type|return_dict"
    r"|reorder_and_upcast_attn|task_specific_params|tokenizer_class|transformers_version|use_cache"
)
# Settings that may be there as long as they say nothing.
_ABSENT = {
    "add_cross_attention": False, "is_encoder_decoder": False, "pruned_heads": {}, "quantization_config": None,
    "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True, "sliding_window": None,
    "tie_encoder_decoder": False, "torchscript": False, "use_bfloat16": False, "use_sliding_window": False,
}  # fmt: skip
# Tensors that some files have and that follow from the settings: causal masks, and rates of rotary positions.
_DERIVED = r"(attn|attention)\.(masked_)?bias|(\w+\.)?rotary_emb\.inv_freq"
_GELU = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


class LanguageModel(nn.Module):
    """A backbone between an embedding of tokens and a head.

    Args:
        config: of the backbone.
        vocabulary: how many tokens there are.
        tied: whether the head's weight is the embedding's.

    Attributes:
        embedding: a vector for each token.
        backbone: see `Backbone`; with it a model decodes by steps: `backbone.step(embedding(tokens), cache)`.
        head: None where tied.

    Example:
        >>> model = LanguageModel(BackboneConfig(dim=32, layers=2, heads=4), vocabulary=50, tied=True)
        >>> hidden = model(torch.zeros(1, 7, dtype=torch.int64))
        >>> model.logits(hidden[:, -1]).shape
        torch.Size([1, 50])
    """

    def __init__(self, config: BackboneConfig, vocabulary: int, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, config.dim)
        self.backbone = Backbone(config)
        self.head = None if tied else nn.Linear(config.dim, vocabulary, bias=False)

    @property
    def weight(self) -> Float[Tensor, "vocabulary dim"]:
        """Of the head, for `linear_cross_entropy(hidden, model.weight, targets)`."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self, tokens: Int64[Tensor, "batch tokens"], *, mask: Mask | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """The backbone's output, before the head.

        Args:
            tokens: 0 to vocabulary - 1.
            mask: who sees whom; `Causal()` by default.

        Raises:
            ConfigError: tokens that are none.
        """
        size, fix = self.embedding.num_embeddings, "use the tokeniser that belongs to this model"
        if tokens.dtype != torch.int64 or tokens.ndim != 2:
            got = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise ConfigError("tokens", expected="int64 (batch, tokens)", got=got, fix=fix)
        if tokens.numel() and not 0 <= (least := int(tokens.min())) <= (most := int(tokens.max())) < size:
            raise ConfigError("tokens", expected=f"0 to {size - 1}", got=f"{least} to {most}", fix=fix)
        out: Tensor = self.backbone(self.embedding(tokens), mask=mask or Causal())
        return out

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocabulary"]:
        """One number for each token of the vocabulary: for few positions, since it is a large tensor."""
        return functional.linear(hidden, self.weight)


def load(
    path: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **settings: Any
) -> LanguageModel:
    """Reads a language model from a folder; safe for a stranger's.

    Args:
        path: the folder.
        dtype: of the weights from now on.
        device: where they go.
        settings: of `BackboneConfig`, for memory and dropout: `remat`, `block_q`, `dropout` and the like. The model's
            own dropout is the default.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: no such folder or files; pickles in their place; a layout or setting that the backbone does not
            have, by its name; tensors that are missing, too many or of another shape; damaged files.
        ConfigError: a setting that is the model's own, or out of its range.
    """
    folder = Path(path)
    for name in settings:
        if name not in _FREE:
            raise ConfigError(name, expected="a setting of memory or dropout", got=name, fix=nearest(name, _FREE))
    source = _Source(folder / "config.json", settings)
    layout = source.choice("model_type", _LAYOUTS, None)
    config, vocabulary = source.config(layout), source.whole("vocab_size")
    tied = bool(source.choice("tie_word_embeddings", {False: False, True: True}, layout.tied))
    source.finish()
    infos = _tensors(_files(folder), layout.prefix)
    if config.layers > len(infos):
        # Before a model of that size is made, if only in outline.
        raise _damaged(folder, f"{config.layers} layers", f"{len(infos)} tensors in all")
    with torch.device("meta"):
        model = LanguageModel(config, vocabulary, tied=tied)
    groups = list(_groups(layout, config, model))
    head = f"{layout.top['head']}.weight"
    if tied and head in infos:
        # Some files have what is tied twice.
        groups.append(replace(groups[0], ours={"twice": vocabulary}, theirs=[head]))
    _compare(folder, groups, infos, layout)
    values = _read(groups, infos, dtype, device)
    if "twice" in values and not torch.equal(values.pop("twice"), values["embedding.weight"]):
        fix = "set tie_word_embeddings to false in config.json, if that is what was meant"
        where, expected = f"{infos[head][0]}: {head}", "the embedding's weight, to which it is tied"
        raise CheckpointError(where, expected=expected, got="another", fix=fix)
    model.load_state_dict(values, assign=True)
    return model.eval()


class _Source:
    """The settings of a `config.json`, each of which must be understood."""

    def __init__(self, path: Path, chosen: Mapping[str, Any]) -> None:
        self._path, self._left, self._chosen = path, _json(path), chosen

    def refuse(self, key: str, expected: str, got: Any) -> CheckpointError:
        fix = "load it with the library that it was made for"
        return CheckpointError(f"{self._path}: {key}", expected=expected, got=repr(got)[:80], fix=fix)

    def take(self, key: str, default: Any = None) -> Any:
        return self._left.pop(key, default)

    def whole(self, key: str, default: int | None = None, *, optional: bool = False) -> Any:
        value = self.take(key, default)
        if value is None and optional:
            return None
        if type(value) is not int or not 1 <= value <= _MAX_SIZE:
            raise self.refuse(key, f"a whole number from 1 to {_MAX_SIZE}", value)
        return value

    def number(self, key: str, default: float, *, least: float = 0.0) -> float:
        value = self.take(key, default)
        if type(value) not in (int, float) or not least <= value < math.inf:
            raise self.refuse(key, f"a number from {least}", value)
        return float(value)

    def choice(self, key: str, choices: Mapping[Any, Any], default: Any) -> Any:
        value = self.take(key, default)
        if type(value) not in (str, bool) or value not in choices:
            raise self.refuse(key, " or ".join(str(name) for name in choices), value)
        return choices[value]

    def rope(self, key: str, fraction: float) -> dict[str, Any]:
        """Rotary positions, in the older spelling or in the newer; `key` names the older one's base."""
        found = {"rope_theta": self.take(key, 10_000.0), "partial_rotary_factor": self.take("rotary_pct", fraction)}
        for name in ("rope_scaling", "rope_parameters"):
            value = self.take(name) or {}
            if not isinstance(value, dict):
                raise self.refuse(name, "an object", value)
            found |= {("rope_type" if inner == "type" else inner): setting for inner, setting in value.items()}
        at = "rope_parameters."
        self._left |= {at + name: setting for name, setting in found.items()}
        settings: dict[str, Any] = {"rope_base": self.number(at + "rope_theta", 0, least=1)}
        settings["fraction"] = self.number(at + "partial_rotary_factor", 0)
        if self.choice(at + "rope_type", {"default": False, "llama3": True}, "default"):
            names = (at + "factor", at + "low_freq_factor", at + "high_freq_factor")
            factor, low, high = (self.number(name, -1, least=1e-9) for name in names)
            tokens = self.whole(at + "original_max_position_embeddings")
            if not low < high:
                raise self.refuse(names[2], f"more than {low}", high)
            settings["rope_stretch"] = RopeStretch(factor=factor, low=low, high=high, tokens=tokens)
        return settings

    def config(self, layout: _Layout) -> BackboneConfig:
        settings = {**layout.settings(self), **self._chosen}
        if (fraction := settings.pop("fraction", None)) is not None:
            size = settings.get("head_dim") or settings["dim"] // settings["heads"]
            settings["rope_dim"] = int(size * fraction)
            if not settings["rope_dim"]:
                raise self.refuse("rotary_pct", "enough for two numbers of a head", fraction)
        try:
            return BackboneConfig(**settings)
        except ConfigError as error:
            if error.where in self._chosen:
                raise
            raise CheckpointError(str(self._path), expected="a possible model", got=str(error), fix=error.fix) from None

    def finish(self) -> None:
        """Refuses settings that nobody asked for."""
        for key, value in self._left.items():
            silent = key in _ABSENT and value in (None, _ABSENT[key])
            if not silent and not _IGNORED.fullmatch(key):
                raise self.refuse(key, "no such setting, or one that changes nothing", value)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where a family of models keeps what.

    Attributes:
        settings: reads those of the backbone.
        prefix: of all names but the head's.
        layers: where they are.
        top: our names of modules outside of layers, and theirs.
        parts: our modules of a layer, and theirs: rows of the former, joined, are those of the latter, joined.
        transposed: whether matrices of layers are stored the other way round.
        by_head: whether queries, keys and values come head by head.
        tied: the default.
    """

    settings: Callable[[_Source], dict[str, Any]]
    prefix: str
    layers: str
    top: Mapping[str, str]
    parts: Mapping[str, str]
    transposed: bool = False
    by_head: bool = False
    tied: bool = False


def _gpt2(source: _Source) -> dict[str, Any]:
    dropout, before = source.number("resid_pdrop", 0.1), source.number("embd_pdrop", 0.1)
    if dropout != before and "dropout" not in source._chosen:
        raise source.refuse("embd_pdrop", f"resid_pdrop, which is {dropout} (or choose: dropout=...)", before)
    return {
        "dim": source.whole("n_embd"),
        "layers": source.whole("n_layer"),
        "heads": source.whole("n_head"),
        "ffn_dim": source.whole("n_inner", optional=True),
        "ffn": source.choice("activation_function", _GELU, "gelu_new"),
        "norm_eps": source.number("layer_norm_epsilon", 1e-5),
        "bias": "all",
        "positions": "learned",
        "max_positions": source.whole("n_positions", 1024),
        "dropout": dropout,
        "attention_dropout": source.number("attn_pdrop", 0.1),
    }


def _neox(source: _Source) -> dict[str, Any]:
    return {
        "dim": source.whole("hidden_size"),
        "layers": source.whole("num_hidden_layers"),
        "heads": source.whole("num_attention_heads"),
        "ffn_dim": source.whole("intermediate_size"),
        "ffn": source.choice("hidden_act", _GELU, "gelu"),
        "norm_eps": source.number("layer_norm_eps", 1e-5),
        "bias": source.choice("attention_bias", {True: "all", False: "ffn"}, True),
        "residual": source.choice("use_parallel_residual", {True: "parallel", False: "sequential"}, True),
        "dropout": source.number("hidden_dropout", 0.0),
        "attention_dropout": source.number("attention_dropout", 0.0),
        **source.rope("rotary_emb_base", 0.25),
    }


def _llama(source: _Source) -> dict[str, Any]:
    both = {False: False, True: True}
    attention, ffn = source.choice("attention_bias", both, False), source.choice("mlp_bias", both, False)
    if attention and not ffn:
        raise source.refuse("attention_bias", "false, or mlp_bias too", attention)
    settings = {
        "dim": source.whole("hidden_size"),
        "layers": source.whole("num_hidden_layers"),
        "heads": source.whole("num_attention_heads"),
        "kv_heads": source.whole("num_key_value_heads", optional=True),
        "head_dim": source.whole("head_dim", optional=True),
        "ffn_dim": source.whole("intermediate_size"),
        "ffn": source.choice("hidden_act", {"silu": "swiglu", "swish": "swiglu"}, "silu"),
        "norm": "rms",
        "norm_eps": source.number("rms_norm_eps", 1e-6),
        "bias": "all" if attention else "ffn" if ffn else "none",
        "attention_dropout": source.number("attention_dropout", 0.0),
        **source.rope("rope_theta", 1.0),
    }
    if settings["fraction"] != 1:
        raise source.refuse("partial_rotary_factor", "1", settings["fraction"])
    return settings


_LAYOUTS = {
    "gpt2": _Layout(
        settings=_gpt2, prefix="transformer.", layers="h", transposed=True, tied=True,
        top={"embedding": "wte", "backbone.table": "wpe", "backbone.norm": "ln_f", "head": "lm_head"},
        parts={"norm1": "ln_1", "q kv": "attn.c_attn", "out": "attn.c_proj", "norm2": "ln_2", "up": "mlp.c_fc",
               "down": "mlp.c_proj"},
    ),
    "gpt_neox": _Layout(
        settings=_neox, prefix="gpt_neox.", layers="layers", by_head=True,
        top={"embedding": "embed_in", "backbone.norm": "final_layer_norm", "head": "embed_out"},
        parts={"norm1": "input_layernorm", "q kv": "attention.query_key_value", "out": "attention.dense",
               "norm2": "post_attention_layernorm", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
    ),
    "llama": _Layout(
        settings=_llama, prefix="model.", layers="layers",
        top={"embedding": "embed_tokens", "backbone.norm": "norm", "head": "lm_head"},
        parts={"norm1": "input_layernorm", "q": "self_attn.q_proj", "kv": "self_attn.k_proj self_attn.v_proj",
               "out": "self_attn.o_proj", "norm2": "post_attention_layernorm", "up": "mlp.gate_proj mlp.up_proj",
               "down": "mlp.down_proj"},
    ),
}  # fmt: skip

_Infos = Mapping[str, tuple[Path, str, TensorInfo]]


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Some of our parameters, whose rows are those of some tensors.

    Attributes:
        ours: names of parameters, and how many rows they have.
        theirs: names of tensors.
        shape: of each tensor.
        turned: whether its rows are columns.
        heads: of queries, keys and values that come head by head; 0 where they do not.
    """

    ours: Mapping[str, int]
    theirs: Sequence[str]
    shape: tuple[int, ...]
    turned: bool
    heads: int

    def values(self, tensors: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Our parameters."""
        value = torch.cat([tensor.T for tensor in tensors] if self.turned else list(tensors))
        if self.heads:
            value = value.reshape(self.heads, 3, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
        yield from zip(self.ours, torch.split(value, list(self.ours.values())), strict=True)


def _groups(layout: _Layout, config: BackboneConfig, model: nn.Module) -> Iterator[_Group]:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    def group(ours: Sequence[str], theirs: Sequence[str], inner: bool) -> _Group:
        rows = {name: shapes[name][0] for name in ours}
        shape = (sum(rows.values()) // len(theirs), *shapes[ours[0]][1:])
        turned = inner and layout.transposed and len(shape) == 2
        heads = config.heads if layout.by_head and len(ours) > 1 else 0
        return _Group(ours=rows, theirs=theirs, shape=shape[::-1] if turned else shape, turned=turned, heads=heads)

    for ours, theirs in layout.top.items():
        # A learned table is a parameter, where theirs is a module.
        for name, kind in ((ours, "weight"), (f"{ours}.weight", "weight"), (f"{ours}.bias", "bias")):
            if name in shapes:
                yield group([name], [f"{theirs}.{kind}"], False)
    for layer in range(config.layers):
        for ours, theirs in layout.parts.items():
            for kind in ("weight", "bias"):
                names = [f"backbone.layers.{layer}.{name}.{kind}" for name in ours.split()]
                if names[0] in shapes:
                    yield group(names, [f"{layout.layers}.{layer}.{name}.{kind}" for name in theirs.split()], True)


def _compare(folder: Path, groups: Sequence[_Group], infos: _Infos, layout: _Layout) -> None:
    """Refuses tensors that are missing, too many, or of another shape or kind."""
    faults, wanted = [], {name: group.shape for group in groups for name in group.theirs}
    for name, shape in wanted.items():
        if name not in infos:
            faults.append(f"{name} is missing")
        elif infos[name][2].shape != shape:
            faults.append(f"{name} has shape {infos[name][2].shape} instead of {shape}")
        elif infos[name][2].dtype not in _FLOATS:
            faults.append(f"{name} has numbers of kind {infos[name][2].dtype}")
    derived = re.compile(rf"({layout.layers}\.\d+\.)?({_DERIVED})")
    faults += [f"{name[:80]} has no place" for name in infos.keys() - wanted if not derived.fullmatch(name)]
    if faults:
        got = "; ".join(sorted(faults)[:8]) + (f" and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise _damaged(folder, "the tensors that config.json speaks of", got)


def _read(groups: Sequence[_Group], infos: _Infos, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    """Our parameters from their tensors; `dtype` and `device` are what they get."""
    values: dict[str, Tensor] = {}
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for group in groups:
            tensors = []
            for file, name, _info in (infos[name] for name in group.theirs):
                try:
                    if file not in opened:
                        opened[file] = stack.enter_context(safe_open(file, framework="pt"))
                    tensors.append(opened[file].get_tensor(name))
                except (SafetensorError, OSError) as error:
                    raise _damaged(file, "a safetensors file", str(error)) from error
            for ours, value in group.values(tensors):
                # A copy: what was read may share memory with other parts, or with the file.
                values[ours] = torch.empty(value.shape, dtype=dtype, device=device).copy_(value)
    return values


def _damaged(path: Path, expected: str, got: str) -> CheckpointError:
    return CheckpointError(str(path), expected=expected, got=got, fix="get it again from its source")


def _files(folder: Path) -> list[Path]:
    """The files that hold tensors."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        names = _json(index).get("weight_map")
        shards = set(names.values()) if isinstance(names, dict) and all(map(_plain, names.values())) else set()
        if not shards:
            raise _damaged(index, "a weight_map to files beside it", "something else")
        return [folder / name for name in sorted(shards)]
    if not single.exists():
        pickles = sorted(found.name for pattern in _PICKLES for found in folder.glob(pattern))
        got, fix = "neither", "give a folder that holds a model"
        if pickles:
            got = f"{pickles[0]}, which may be a pickle"
            fix = "pickle can run code and is never read; have it saved as safetensors by whom you trust"
        raise CheckpointError(str(folder), expected="model.safetensors, or its index", got=got, fix=fix)
    return [single]


def _plain(name: Any) -> bool:
    """Whether it is the name of a file of tensors in the same folder."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) is not None


def _tensors(files: Sequence[Path], prefix: str) -> _Infos:
    """By its name without the prefix, each tensor's file, name there, type and shape."""
    infos: dict[str, tuple[Path, str, TensorInfo]] = {}
    for file in files:
        for name, info in read_tensor_infos(file).items():
            if (short := name.removeprefix(prefix)) in infos:
                raise _damaged(file, "each tensor once", f"{name[:80]} again")
            infos[short] = file, name, info
    return infos


def _json(path: Path) -> dict[str, Any]:
    fix = "give a folder that holds config.json and model.safetensors"
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MAX_JSON_BYTES))
    except OSError as error:
        raise CheckpointError(str(path), expected="a file", got=error.strerror or "none", fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), expected="JSON", got=f"{type(error).__name__}", fix=fix) from error
    if not isinstance(content, dict):
        raise CheckpointError(str(path), expected="a JSON object", got=type(content).__name__, fix=fix)
    return content
