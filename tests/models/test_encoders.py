"""Encoders: principal components, the small network, and files of others in the layouts in which they come."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from offbook.errors import CheckpointError, ConfigError
from offbook.models.encoders import (
    ConvSizes,
    PcaSizes,
    PixelPca,
    SmallConv,
    build_encoder,
    encoder_digest,
    load_encoder,
    planes,
    save_encoder,
)
from offbook.models.pretrained import ResNet, ResNetSizes


def frames(count=6, height=20, width=24, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, height, width, 3), generator=rng, dtype=torch.uint8)


class Block(nn.Module):
    """A residual block with the older names, written down from the paper: the stride is in the 3x3 convolution."""

    def __init__(self, inside, out, stride, bottleneck):
        super().__init__()
        middle = out // 4 if bottleneck else out
        kernels = [(inside, middle, 1), (middle, middle, 3), (middle, out, 1)] if bottleneck else [
            (inside, out, 3), (out, out, 3)
        ]  # fmt: skip
        for number, (a, b, size) in enumerate(kernels, 1):
            move = stride if size == 3 and (bottleneck or number == 1) else 1
            self.add_module(f"conv{number}", nn.Conv2d(a, b, size, move, size // 2, bias=False))
            self.add_module(f"bn{number}", nn.BatchNorm2d(b))
        self.count = len(kernels)
        if stride > 1 or inside != out:
            self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = x
        for number in range(1, self.count + 1):
            y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
            y = functional.relu(y) if number < self.count else y
        return functional.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class OlderResNet(nn.Module):
    """The layout in which ImageNet's, MoCo's and R3M's weights are given away."""

    def __init__(self, bottleneck=True, stem=8, channels=(16, 32), blocks=(2, 1)):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem)
        inside = stem
        for stage, (out, count) in enumerate(zip(channels, blocks, strict=True), 1):
            layers = [Block(inside if i == 0 else out, out, 2 if stage > 1 and i == 0 else 1, bottleneck)
                      for i in range(count)]  # fmt: skip
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
            inside = out
        self.fc = nn.Linear(inside, 5)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in (self.layer1, self.layer2):
            x = stage(x)
        return x.mean((2, 3))


@pytest.fixture(params=[True, False], ids=["bottleneck", "basic"])
def older(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = OlderResNet(request.param)
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    return network.eval()


def expected(network, images):
    mean, std = (torch.tensor(of)[:, None, None] for of in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        return network((planes(images, 224) - mean) / std)


def as_plain(network, path):
    torch.save(network.state_dict(), path / "resnet.pth")
    return path / "resnet.pth"


def as_moco(network, path):
    named = {f"module.encoder_q.{name}": of for name, of in network.state_dict().items()}
    other = {f"module.encoder_k.{name}": of + 1 for name, of in network.state_dict().items()}
    whole = {"epoch": 200, "arch": "resnet50", "state_dict": {**other, **named}, "optimizer": {"state": {0: {}}}}
    torch.save(whole, path / "moco.pth.tar")
    return path / "moco.pth.tar"


def as_r3m(network, path):
    named = {f"module.convnet.{name}": of for name, of in network.state_dict().items() if "fc." not in name}
    torch.save({"r3m": {**named, "module.lang_enc.w": torch.zeros(3)}, "global_step": 1}, path / "r3m.pt")
    return path / "r3m.pt"


def as_safetensors(network, path):
    from safetensors.torch import save_file

    save_file(network.state_dict(), path / "resnet.safetensors")
    return path / "resnet.safetensors"


@pytest.mark.parametrize("write", [as_plain, as_moco, as_r3m, as_safetensors])
def test_resnets_in_the_layouts_of_others_give_their_features(older, tmp_path, write):
    encoder, seen = load_encoder(write(older, tmp_path)), frames(2)
    assert encoder.size == 32
    np.testing.assert_allclose(encoder(seen), expected(older, seen), atol=1e-4)
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    # Kept as one of ours it is the same to the last bit, and of one number type.
    save_encoder(tmp_path / "ours.safetensors", encoder, {"from": "a test"})
    again = load_encoder(tmp_path / "ours.safetensors")
    assert torch.equal(again(seen), encoder(seen))
    assert encoder_digest(again) == encoder_digest(encoder)
    assert {of.dtype for of in again.state_dict().values()} == {torch.float32}


def test_folders_of_transformers(tmp_path):
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        ResNetConfig,
        ResNetForImageClassification,
    )

    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16, "projection_dim": 6}  # fmt: skip
    words = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    seen = frames(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)).eval()
        both = CLIPModel(CLIPConfig(text_config=words, vision_config=vision, projection_dim=6)).eval()
        resnet = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2]))
    mean, std = (torch.tensor(of)[:, None, None] for of in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
    x = (planes(seen, 32, "bicubic") - mean) / std
    resnet.eval()
    with torch.no_grad():
        wanted = {
            "clip": (clip, clip(x).image_embeds),
            "both": (both, both.visual_projection(both.vision_model(x).pooler_output)),
            "resnet": (resnet, expected(lambda y: resnet.resnet(y).pooler_output.flatten(1), seen)),
        }
    for name, (network, features) in wanted.items():
        network.save_pretrained(tmp_path / name)
        encoder = load_encoder(tmp_path / name)
        np.testing.assert_allclose(encoder(seen), features, atol=1e-5, err_msg=name)
        save_encoder(tmp_path / "ours.safetensors", encoder, {})
        assert torch.equal(load_encoder(tmp_path / "ours.safetensors")(seen), encoder(seen))
    config = tmp_path / "resnet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "downsample_in_bottleneck": True}))
    with pytest.raises(CheckpointError, match="downsample_in_bottleneck: expected False"):
        load_encoder(tmp_path / "resnet")
    config.write_text(json.dumps({"model_type": "convnext"}))
    with pytest.raises(CheckpointError, match="model_type that is read here, got 'convnext'"):
        load_encoder(tmp_path / "resnet")


class Bomb:
    def __reduce__(self):
        return print, ("boom",)


@pytest.mark.faults
def test_files_that_are_no_encoder_are_refused_and_nothing_is_run(older, tmp_path, capsys):
    named = older.state_dict()
    written = {
        "bomb.pt": {"state_dict": Bomb()},
        "nothing.pt": {"a": torch.zeros(2)},
        "short.pt": {name: of for name, of in named.items() if "bn2" not in name},
        "wide.pt": {**named, "layer1.0.conv2.weight": torch.zeros(3, 3, 3, 3)},
        "two.pt": {**{f"a.{k}": v for k, v in named.items()}, **{f"b.{k}": v for k, v in named.items()}},
    }
    messages = {"bomb": "tensors and plain values alone", "nothing": "weights of one ResNet, got 0 among 1 tensors",
                "short": "weights of a ResNet", "wide": "weights of a ResNet", "two": "got 2 among"}  # fmt: skip
    for file, content in written.items():
        torch.save(content, tmp_path / file)
        with pytest.raises(CheckpointError, match=messages[file.removesuffix(".pt")]):
            load_encoder(tmp_path / file)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    (tmp_path / "empty").mkdir()
    for name in ("plain.pth", "empty", "missing.pt"):
        with pytest.raises(CheckpointError, match=name.partition(".")[0]):
            load_encoder(tmp_path / name)
    assert "boom" not in capsys.readouterr().out


def test_components_are_those_of_the_pixels():
    seen = frames(60, 8, 8)
    encoder = PixelPca(PcaSizes(side=8, size=12)).fit(seen, torch.Generator().manual_seed(1))
    x = (seen.permute(0, 3, 1, 2).float() / 255).flatten(1).double().numpy()
    x -= x.mean(0)
    values = np.linalg.svd(x, compute_uv=False)
    found = encoder(seen).double().numpy()
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)
    # Random numbers have a flat spectrum, the hardest case; the share of the variance is nearly the best one.
    best = (values[:12] ** 2).sum() / (values**2).sum()
    assert 0.97 * best < encoder.explained <= best + 1e-6
    np.testing.assert_allclose((found**2).sum() / (x**2).sum(), encoder.explained, rtol=1e-4)
    with pytest.raises(ConfigError, match="more than 12 frames, got 12"):
        PixelPca(PcaSizes(side=8, size=12)).fit(seen[:12], torch.Generator())


def test_features_do_not_depend_on_the_batch_and_tell_where_things_are():
    encoder = SmallConv(ConvSizes(width=8, size=16)).eval()
    seen = frames(5, 64, 64)
    with torch.no_grad():
        np.testing.assert_allclose(encoder(seen)[:1], encoder(seen[:1]), atol=1e-5)
        moved = torch.roll(seen, 16, 2)
        assert (encoder(moved) - encoder(seen)).norm() > 0.1 * encoder(seen).norm()


@pytest.mark.parametrize(
    "record",
    [
        {}, {"kind": "oracle"}, {"kind": "conv", "side": 60}, {"kind": "conv", "width": 10**9},
        {"kind": "conv", "hue": 1}, {"kind": "pca", "size": 0},
        {"kind": "resnet", "stem": 8, "channels": [10**9], "blocks": [1], "bottleneck": True},
        {"kind": "clip", "side": 224, "patch": 32, "width": 7, "hidden": 9, "layers": 1, "heads": 2, "size": 4},
    ],
)  # fmt: skip
def test_records_that_lie(record):
    with pytest.raises(ConfigError):
        build_encoder(record)


def test_a_large_record_costs_nothing_until_its_weights_are_there(tmp_path):
    record = {**ResNet(ResNetSizes(stem=8, channels=(16,), blocks=(1,), bottleneck=True)).record(), "stem": 8_192}
    encoder = SmallConv(ConvSizes(width=4, size=2))
    encoder.record = lambda: {**record, "channels": [65_536] * 8, "blocks": [256] * 8}
    save_encoder(tmp_path / "liar.safetensors", encoder, {})
    with pytest.raises(CheckpointError, match=r"liar\.safetensors"):
        load_encoder(tmp_path / "liar.safetensors")
