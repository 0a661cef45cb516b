"""Models that another library wrote give the same numbers here, and what we do not have is refused by its name."""

import json
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offbook.errors import CheckpointError, ConfigError
from offbook.models.blockwise import Backbone
from offbook.models.blockwise.head import linear_cross_entropy
from offbook.models.blockwise.hf import LanguageModel, load

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", {**GPT2, "n_inner": 40, "activation_function": "gelu", "tie_word_embeddings": False}),
    "neox": ("GPTNeoX", WIDE),
    "neox-sequential": ("GPTNeoX", {**WIDE, "use_parallel_residual": False, "attention_bias": False,
                                    "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0,
                                                        "rope_theta": 500.0}, "hidden_act": "gelu_fast"}),
    "llama": ("Llama", {**WIDE, "num_key_value_heads": 2}),
    "llama-biased": ("Llama", {**WIDE, "attention_bias": True, "mlp_bias": True, "head_dim": 12,
                               "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
}  # fmt: skip


def make(name: str, **settings: Any) -> Any:
    """A tiny model of theirs with numbers of ordinary size everywhere."""
    family, config = MODELS[name]
    special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None, "vocab_size": 50}
    model = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")(
        getattr(transformers, f"{family}Config")(**{**special, **config, **settings})
    )
    torch.manual_seed(3)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def save(model: Any, folder: Path, **settings: Any) -> Path:
    model.save_pretrained(folder, **settings)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_the_same(name: str, tmp_path: Path) -> None:
    theirs = make(name)
    # Shards of a few tensors each, so that what belongs together is in different files.
    ours = Backbone.from_hf(save(theirs, tmp_path, max_shard_size="8KB" if "neox" in name else "1GB"), remat="layer")
    assert (tmp_path / "model.safetensors.index.json").exists() == ("neox" in name)
    assert ours.backbone.config.remat == "layer"
    tokens = torch.randint(50, (2, 48))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours.logits(ours(tokens)), expected, atol=1e-4, rtol=1e-4)
        loss = theirs(tokens, labels=tokens).loss
        torch.testing.assert_close(linear_cross_entropy(ours(tokens)[:, :-1], ours.weight, tokens[:, 1:]), loss)

        prompt = tokens[:, :20]
        mask = torch.ones_like(prompt)
        generated = theirs.generate(prompt, attention_mask=mask, max_new_tokens=24, do_sample=False)
        cache = ours.backbone.new_cache(2, 44)
        hidden, _ = ours.backbone.prefill(ours.embedding(prompt), cache=cache, chunk=7)
        decoded = [prompt]
        for _ in range(24):
            decoded.append(ours.logits(hidden[:, -1:]).argmax(-1))
            if len(decoded) <= 24:
                hidden = ours.backbone.step(ours.embedding(decoded[-1]), cache)
    assert torch.equal(torch.cat(decoded, 1), generated)


def test_what_is_loaded_trains(tmp_path: Path) -> None:
    ours = load(save(make("gpt2"), tmp_path), dropout=0.0, attention_dropout=0.0).train()
    tokens = torch.randint(50, (1, 12))
    linear_cross_entropy(ours(tokens)[:, :-1], ours.weight, tokens[:, 1:]).backward()
    assert all(weight.grad is not None for weight in ours.parameters())
    half = load(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert half.backbone.config.dropout == 0.1
    with pytest.raises(ConfigError, match="tokens: expected 0 to 49, got 0 to 50"):
        ours(torch.tensor([[0, 50]]))
    with pytest.raises(ConfigError, match=re.escape("int64 (batch, tokens), got torch.int64 (2,)")):
        ours(torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="expected a setting of memory or dropout, got blockq; did you mean"):
        load(tmp_path, blockq=3)


def test_older_spellings(tmp_path: Path) -> None:
    theirs = make("neox", rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 99.0})
    edit(
        save(theirs, tmp_path),
        rope_parameters=None,
        rotary_pct=0.5,
        rotary_emb_base=99,
        rope_scaling=None,
        torch_dtype="float32",
    )
    tokens = torch.randint(50, (1, 9))
    with torch.no_grad():
        ours = load(tmp_path)
        torch.testing.assert_close(ours.logits(ours(tokens)), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    # A body without a head, derived tensors, and what is tied twice.
    gpt2 = make("gpt2")
    save(gpt2.transformer, tmp_path / "body")
    values = load_file(tmp_path / "body/model.safetensors")
    values |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "lm_head.weight": values["wte.weight"].clone()}
    save_file(values, tmp_path / "body/model.safetensors")
    with torch.no_grad():
        ours = load(tmp_path / "body")
        torch.testing.assert_close(ours.logits(ours(tokens)), gpt2(tokens).logits, atol=1e-4, rtol=1e-4)
    save_file({**values, "lm_head.weight": values["wte.weight"] + 1}, tmp_path / "body/model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight: expected the embedding's weight, .*tie_word_embeddings"
    ):
        load(tmp_path / "body")


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "mamba"}, "model_type: expected gpt2 or gpt_neox or llama, got 'mamba'"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type: expected default or llama3, got"),
    ("llama", {"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "rope_type: .*got 'linear'"),
    ("llama", {"rope_parameters": {**LLAMA3, "attention_factor": 2.0}}, "rope_parameters.attention_factor: "),
    ("llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": 9}}, "high_freq_factor: expected more than 9"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: expected 1"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters: expected an object"),
    ("llama", {"hidden_act": "relu"}, "hidden_act: expected silu or swish, got 'relu'"),
    ("llama", {"sliding_window": 16}, "sliding_window: expected no such setting"),
    ("llama", {"attention_bias": True}, "attention_bias: expected false, or mlp_bias too"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: "),
    ("llama", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map: "),
    ("llama", {"hidden_size": 10**30}, "hidden_size: expected a whole number"),
    ("llama", {"hidden_size": True}, "hidden_size: expected a whole number"),
    ("llama", {"num_hidden_layers": 10**7}, "expected 10000000 layers, got 21 tensors in all"),
    ("llama", {"num_key_value_heads": 3}, "heads and kv_heads: expected a multiple"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number"),
    ("llama", {"vocab_size": 51}, r"embed_tokens.weight has shape \(50, 32\) instead of \(51, 32\); lm_head"),
    ("llama", {"num_hidden_layers": 3}, "layers.2.input_layernorm.weight is missing; .*and 1 more"),
    ("llama", {"num_hidden_layers": 1}, "layers.1.input_layernorm.weight has no place; "),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: "),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: "),
    ("gpt2", {"embd_pdrop": 0.3}, "embd_pdrop: expected resid_pdrop, which is 0.1"),
    ("neox", {"rope_parameters": {"partial_rotary_factor": 0.01}}, "rotary_pct: expected enough"),
]  # fmt: skip


def test_settings_that_we_do_not_have_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("llama", "gpt2", "neox"):
        save(make(name), tmp_path / name)
    for name, settings, message in REFUSED:
        original = (tmp_path / name / "config.json").read_text()
        edit(tmp_path / name, **settings)
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / name)
        (tmp_path / name / "config.json").write_text(original)
    assert isinstance(load(tmp_path / "gpt2"), LanguageModel)


def truncate(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])


def oversize(folder: Path) -> None:
    header = json.dumps({"wte.weight": {"dtype": "F32", "shape": [2**40, 32], "data_offsets": [0, 2**47]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def integers(folder: Path) -> None:
    values = load_file(folder / "model.safetensors")
    values["transformer.ln_f.weight"] = values["transformer.ln_f.weight"].to(torch.int32)
    save_file(values, folder / "model.safetensors")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def disguised(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(list(range(99))))


def index(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text) and None


DAMAGED: list[tuple[Callable[[Path], None], str]] = [
    (truncate, "model.safetensors: expected .* a truncated file"),
    (oversize, "model.safetensors: expected .* a truncated file"),
    (integers, "ln_f.weight has numbers of kind I32"),
    (pickled, "got pytorch_model.bin, which may be a pickle; pickle can run code"),
    (disguised, "got a pickle"),
    (lambda folder: (folder / "model.safetensors").unlink(), "expected model.safetensors, or its index, got neither"),
    (index('{"weight_map": {"a": "../../model.safetensors"}}'), "a weight_map to files beside it"),
    (index('{"weight_map": {"a": "model.bin"}}'), "a weight_map to files beside it"),
    (index('{"weight_map": {"a": 3}}'), "a weight_map to files beside it"),
    (index('{"weight_map": {"a": "other.safetensors"}}'), "other.safetensors: expected a file"),
    (index("[" * 100_000), "index.json: expected JSON, got RecursionError"),
    (
        lambda folder: (folder / "config.json").write_text("[1]") and None,
        "config.json: expected a JSON object, got list",
    ),
    (lambda folder: (folder / "config.json").unlink(), "config.json: expected a file, got No such file"),
]


@pytest.mark.faults
def test_damaged_and_hostile_folders_are_refused(tmp_path: Path) -> None:
    model = make("gpt2")
    for number, (damage, message) in enumerate(DAMAGED):
        folder = save(model, tmp_path / str(number))
        damage(folder)
        with pytest.raises(CheckpointError, match=message):
            load(folder)
    twice = save(make("neox"), tmp_path / "twice", max_shard_size="8KB")
    shards = sorted(twice.glob("*.safetensors"))
    save_file({**load_file(shards[0]), **load_file(shards[1])}, shards[0])
    with pytest.raises(CheckpointError, match=r"each tensor once, got .* again"):
        load(twice)
