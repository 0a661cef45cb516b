"""Encoders that others have trained, from local files: ResNets of ImageNet, MoCo, R3M or BYOL, and CLIP's transformers.

Files of weights are read in three layouts, folded into one: that of the library transformers, the older one of ResNets
(`layer1.0.conv1.weight`, ...), and the latter under the prefixes that MoCo, R3M and the like put before it. How large
a ResNet is follows from the shapes of its weights. Nothing is downloaded, and no pickle is run.

Source: He et al., "Deep Residual Learning" (2016), with the stride in the 3x3 convolution; Radford et al., "Learning
    Transferable Visual Models From Natural Language Supervision" (2021); Nair et al., "R3M" (2022); Chen et al.,
    "Improved Baselines with Momentum Contrastive Learning" (2020).
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from offbook.errors import CheckpointError, ConfigError, OffbookError, check_settings, nearest, needs_extra
from offbook.models.encoders import Encoder, Images, planes
from offbook.runs.checkpoint import MAGIC, read_tensor_infos
from offbook.runs.config import to_json

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_Act = Literal["quick_gelu", "gelu"]


@dataclass(frozen=True, kw_only=True)
class ResNetSizes:
    """Of `ResNet`.

    Attributes:
        stem: channels after the first convolution.
        channels: of each stage's output.
        blocks: of each stage.
        bottleneck: whether a block has three convolutions or two.
        side: to which frames are scaled, in pixels.
    """

    stem: int
    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    bottleneck: bool
    side: int = 224

    def __post_init__(self) -> None:
        stages = len(self.channels)
        least = 4 if self.bottleneck else 1
        checks = {
            "stem": (1 <= self.stem <= 8_192, "1 to 8192"),
            "channels": (1 <= stages <= 8 and all(least <= n <= 65_536 for n in self.channels), "1 to 8 widths"),
            "blocks": (len(self.blocks) == stages and all(1 <= n <= 256 for n in self.blocks), "as many numbers"),
            "side": (32 <= self.side <= 1_024, "32 to 1024 pixels"),
        }
        check_settings(self, checks, "")


class _Library(Encoder):
    """What is computed by the library transformers."""

    network: Any


N = TypeVar("N", bound=_Library)


class _FrozenNorm(nn.Module):
    """A batch norm that is over with training: it has no count of steps, the one number that is not a float."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, weight, bias = (
            self.get_buffer(name) for name in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, variance, weight, bias)


class ResNet(_Library):
    """A residual network without its last layer: the mean of its last maps.

    Args:
        sizes: see `ResNetSizes`.
    """

    kind = "resnet"

    def __init__(self, sizes: ResNetSizes) -> None:
        super().__init__()
        with needs_extra("vision"):
            from transformers import ResNetConfig, ResNetModel
        self.sizes, self.size = sizes, sizes.channels[-1]
        layer = "bottleneck" if sizes.bottleneck else "basic"
        config = ResNetConfig(
            embedding_size=sizes.stem, hidden_sizes=list(sizes.channels), depths=list(sizes.blocks), layer_type=layer
        )
        self.network = ResNetModel(config)
        for name, module in list(self.network.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                self.network.set_submodule(name, _FrozenNorm(module.num_features))

    def forward(self, images: Images) -> Float[Tensor, "batch size"]:
        """The features."""
        x = _standard(planes(images, self.sizes.side), _IMAGENET)
        out: Tensor = self.network(x).pooler_output
        return out.flatten(1).float()

    def record(self) -> dict[str, Any]:
        """What `build_encoder` builds the like from."""
        return {"kind": self.kind, **to_json(self.sizes)}


@dataclass(frozen=True, kw_only=True)
class ClipSizes:
    """Of `ClipVision`.

    Attributes:
        side: height and width of its pictures, in pixels.
        patch: of its patches.
        width: size of a token.
        hidden: width between the two layers of a block.
        layers: number of blocks.
        heads: of attention.
        size: numbers of the features.
        activation: between the two layers of a block.
        epsilon: of the norms.
    """

    side: int
    patch: int
    width: int
    hidden: int
    layers: int
    heads: int
    size: int
    activation: _Act = "quick_gelu"
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        checks = {
            "side": (16 <= self.side <= 1_024, "16 to 1024 pixels"),
            "patch": (1 <= self.patch <= self.side, "1 to the side"),
            "heads": (1 <= self.heads <= 256, "1 to 256"),
            "width": (1 <= self.width <= 16_384 and self.width % max(1, self.heads) == 0, "a multiple of the heads"),
            "hidden": (1 <= self.hidden <= 65_536, "1 to 65536"),
            "layers": (1 <= self.layers <= 256, "1 to 256"),
            "size": (1 <= self.size <= 65_536, "1 to 65536"),
            "epsilon": (0 < self.epsilon < 1, "between 0 and 1"),
        }
        check_settings(self, checks, "")


class ClipVision(_Library):
    """CLIP's transformer of pictures, with the projection into the space that it shares with texts.

    Args:
        sizes: see `ClipSizes`.
    """

    kind = "clip"

    def __init__(self, sizes: ClipSizes) -> None:
        super().__init__()
        with needs_extra("vision"):
            from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
        self.sizes, self.size = sizes, sizes.size
        config = CLIPVisionConfig(
            hidden_size=sizes.width, intermediate_size=sizes.hidden, num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads, image_size=sizes.side, patch_size=sizes.patch, projection_dim=sizes.size,
            hidden_act=sizes.activation, layer_norm_eps=sizes.epsilon,
        )  # fmt: skip
        self.network = CLIPVisionModelWithProjection(config)
        embeddings = self.network.vision_model.embeddings
        # No file holds it, so that it must be there however the module is made, on the device `meta` too.
        numbers = torch.arange(embeddings.num_positions, device="cpu")[None]
        embeddings.register_buffer("position_ids", numbers, persistent=False)

    def forward(self, images: Images) -> Float[Tensor, "batch size"]:
        """The features."""
        x = _standard(planes(images, self.sizes.side, "bicubic"), _CLIP)
        out: Tensor = self.network(x).image_embeds
        return out.float()

    def record(self) -> dict[str, Any]:
        """What `build_encoder` builds the like from."""
        return {"kind": self.kind, **to_json(self.sizes)}


def _standard(x: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, std = (torch.tensor(of, device=x.device)[:, None, None] for of in statistics)
    return (x - mean) / std


def load_pretrained(path: Path | str) -> Encoder:
    """Reads a network of others.

    Args:
        path: a folder with `config.json` and `model.safetensors` as transformers writes it (`clip`,
            `clip_vision_model`, `resnet`); or a file with the weights of a ResNet: `.safetensors`, or `.pt` and `.pth`
            of which only tensors are read.

    Raises:
        CheckpointError: no such file; a pickle of anything but tensors and plain values; a network of another kind;
            weights that are missing.
        MissingExtraError: transformers is not installed.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        got, fix = "neither", "check the path"
        raise CheckpointError(str(path), expected="an encoder: a folder or a file", got=got, fix=fix)
    return _resnet(path, _weights(path))


def _from_folder(folder: Path) -> Encoder:
    file, fix = folder / "config.json", "check the path"
    try:
        config = json.loads(file.read_text())
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected, got = "a trained encoder, or a folder of transformers", f"no config.json of one ({error})"
        raise CheckpointError(str(folder), expected=expected, got=got, fix=fix) from error
    with needs_extra("vision"):
        from transformers import CLIPVisionModelWithProjection, ResNetModel
    readers: dict[str, tuple[Any, Callable[[Mapping[str, Any]], _Library]]] = {
        "resnet": (ResNetModel, _resnet_of),
        "clip": (CLIPVisionModelWithProjection, _clip_of),
        "clip_vision_model": (CLIPVisionModelWithProjection, _clip_of),
    }
    if kind not in readers:
        fix = nearest(str(kind), readers)
        raise CheckpointError(str(file), expected="a model_type that is read here", got=repr(kind)[:60], fix=fix)
    library, make = readers[kind]
    try:
        # Of safetensors alone, and without the code that a folder may bring along.
        network, told = library.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        encoder = _filled(partial(make, network.config.to_dict()), network.state_dict())
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, OffbookError) as error:
        got = f"one that cannot be read ({str(error).strip().splitlines()[0][:200]})"
        raise CheckpointError(str(folder), expected=f"a {kind} of transformers", got=got, fix=fix) from error
    if missing := sorted(told["missing_keys"]):
        got = f"{len(missing)} that are missing, the first {missing[0]!r}"
        raise CheckpointError(str(folder), expected="all of its weights", got=got, fix="get the whole folder again")
    return encoder


def _clip_of(config: Mapping[str, Any]) -> ClipVision:
    sizes = ClipSizes(
        side=config["image_size"], patch=config["patch_size"], width=config["hidden_size"],
        hidden=config["intermediate_size"], layers=config["num_hidden_layers"], heads=config["num_attention_heads"],
        size=config["projection_dim"], activation=config["hidden_act"], epsilon=config["layer_norm_eps"],
    )  # fmt: skip
    return ClipVision(sizes)


def _resnet_of(config: Mapping[str, Any]) -> ResNet:
    for name, wanted in (
        ("downsample_in_bottleneck", False),
        ("downsample_in_first_stage", False),
        ("hidden_act", "relu"),
    ):
        if config[name] != wanted:
            raise ConfigError(name, expected=str(wanted), got=str(config[name]), fix="use another network")
    sizes = ResNetSizes(
        stem=config["embedding_size"], channels=tuple(config["hidden_sizes"]), blocks=tuple(config["depths"]),
        bottleneck=config["layer_type"] == "bottleneck",
    )  # fmt: skip
    return ResNet(sizes)


def _weights(file: Path) -> dict[str, Tensor]:
    """All tensors of a file by name; those of dictionaries in dictionaries too, for that is where some keep them."""
    with file.open("rb") as stream:
        start = stream.read(8)
    if file.suffix == ".safetensors" or not start.startswith(tuple(MAGIC)):
        read_tensor_infos(file)
        return load_file(str(file))
    fix = "save its state_dict() with torch.save, or as safetensors"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of another version, which are then refused
            return _collected(torch.load(file, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        got = f"something else ({str(error).strip().splitlines()[0][:120]})"
        raise CheckpointError(str(file), expected="tensors and plain values alone", got=got, fix=fix) from error


def _collected(found: object) -> dict[str, Tensor]:
    """Tensors by name, those of inner dictionaries too: some keep their weights under a name of their own."""
    if not isinstance(found, Mapping):
        return {}
    inner = [_collected(value) for value in found.values() if isinstance(value, Mapping)]
    here = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    return {name: tensor for each in (*inner, here) for name, tensor in each.items()}


def _filled(make: Callable[[], N], weights: Mapping[str, Tensor]) -> N:
    """A network with its weights; what would be made only to be overwritten is not made."""
    with torch.device("meta"):
        encoder = make()
    counted = "num_batches_tracked"
    state = {name: of.float().contiguous() for name, of in weights.items() if not name.endswith(counted)}
    encoder.network.load_state_dict(state, assign=True)
    return encoder


def _resnet(file: Path, weights: Mapping[str, Tensor]) -> ResNet:
    """A ResNet under whatever prefix, of whatever size."""
    names = _renamed(file, weights)
    first = "embedder.embedder.convolution.weight"
    stages = 1 + max(int(found[1]) for name in names if (found := re.match(r"encoder\.stages\.(\d+)\.", name)))

    def blocks(stage: int) -> list[str]:
        stem, inside = f"encoder.stages.{stage}.layers.", ".layer.0.convolution.weight"
        return [name.removesuffix(inside) for name in names if name.startswith(stem) and name.endswith(inside)]

    try:
        bottleneck = f"{blocks(0)[0]}.layer.2.convolution.weight" in names
        last = f".layer.{1 + bottleneck}.convolution.weight"
        sizes = ResNetSizes(
            stem=len(names[first]),
            channels=tuple(len(names[f"{blocks(stage)[0]}{last}"]) for stage in range(stages)),
            blocks=tuple(len(blocks(stage)) for stage in range(stages)),
            bottleneck=bottleneck,
        )
        return _filled(partial(ResNet, sizes), names)
    except (ConfigError, KeyError, IndexError, RuntimeError) as error:
        got = f"others ({str(error).strip().splitlines()[-1].strip()[:200]})"
        fix = "get the file again from its source"
        raise CheckpointError(str(file), expected="the weights of a ResNet", got=got, fix=fix) from error


def _renamed(file: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the one ResNet in a file, under the names of transformers, without its last layer."""
    older, newer = "layer1.0.conv1.weight", "encoder.stages.0.layers.0.layer.0.convolution.weight"
    found = [(name.removesuffix(mark), mark) for name in weights for mark in (older, newer) if name.endswith(mark)]
    # Of a network and its slowly following copy, the network.
    found = [each for each in found if not re.search(r"encoder_k|target|momentum|ema", each[0])] or found
    if len(found) != 1:
        got = f"{len(found)} among {len(weights)} tensors" + (f": {', '.join(p for p, _ in found)}" if found else "")
        fix = f"give a file with names like {older!r}"
        raise CheckpointError(str(file), expected="the weights of one ResNet", got=got[:200], fix=fix)
    prefix, mark = found[0]
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    renamed = own if mark == newer else {_new_name(name): tensor for name, tensor in own.items()}
    return {name: tensor for name, tensor in renamed.items() if name.startswith(("embedder.", "encoder."))}


def _new_name(name: str) -> str:
    """`layer2.0.bn1.weight` as `encoder.stages.1.layers.0.layer.0.normalization.weight`, and so on."""
    kinds = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    if found := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
        return f"embedder.embedder.{kinds[found[1]]}.{found[2]}"
    found = re.fullmatch(r"layer(\d+)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01]))\.(\w+)", name)
    if found is None:
        return name
    stage, block, kind, number, cut, last = found.groups()
    place = f"shortcut.{kinds[cut]}" if cut else f"layer.{int(number) - 1}.{kinds[kind]}"
    return f"encoder.stages.{int(stage) - 1}.layers.{block}.{place}.{last}"
