"""A language model in plain PyTorch whose layers compute by blocks: learns this file, says what fits, decodes."""

import sys
from pathlib import Path

import torch
from torch import nn

from offbook.models.blockwise import Backbone, BackboneConfig, Causal, argmax, linear_cross_entropy, longest, plan


def main(steps: int) -> None:
    torch.manual_seed(0)
    config = BackboneConfig(dim=64, layers=2, heads=4, remat="layer")
    embedding, backbone = nn.Embedding(256, config.dim), Backbone(config)  # the head's weight is the embedding's
    nn.init.normal_(embedding.weight, std=0.02)

    text = torch.tensor(list(Path(__file__).read_bytes()))[None]
    print(
        f"{text.shape[1]} bytes; a step takes about {plan(config, text.shape[1]).total / 2**20:.0f} MiB beside the head"
    )
    print(f"in 1 GiB there would be room for {longest(config, 2**30):,} tokens")

    weights = [*embedding.parameters(), *backbone.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=3e-3)
    for step in range(steps):
        hidden = backbone(embedding(text[:, :-1]), mask=Causal())
        loss = linear_cross_entropy(hidden, embedding.weight, text[:, 1:])  # never holds all logits
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    backbone.eval()
    with torch.no_grad():
        cache = backbone.new_cache(batch=1, max_len=100)
        hidden, cache = backbone.prefill(embedding(text[:, :40]), cache=cache)
        said = [argmax(hidden[:, -1], embedding.weight)]
        while len(said) < 20:
            hidden = backbone.step(embedding(said[-1][:, None]), cache)
            said.append(argmax(hidden[:, -1], embedding.weight))
    print("goes on with", repr(bytes(int(token) for token in said)))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
