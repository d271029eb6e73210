"""A small GPT on the characters of a text, in torch: hidden matrices by Muon, the rest by Adam; schedule, checkpoint.

    python notebooks/scripts/nanogpt.py [--quick] [--text FILE] [--steps 2000]

After Karpathy's nanoGPT. Without a text it reads this package's own source.
"""

import argparse
import math
import pathlib
import tempfile

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import chainrule
from chainrule import torch_optimizers


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        rows, length, width = x.shape
        shape = rows, length, self.heads, width // self.heads
        q, k, v = (
            part.view(shape).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, -1)
        )
        seen = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: seconds")
    parser.add_argument("--text", type=pathlib.Path)
    parser.add_argument("--steps", type=int)
    given = parser.parse_args()
    steps = given.steps or (30 if given.quick else 2000)
    length, width, heads, layers, rows = (32, 32, 2, 2, 8) if given.quick else (128, 192, 6, 6, 32)

    torch.manual_seed(0)
    text = (given.text or pathlib.Path(chainrule.__file__).with_name("cli.py")).read_text()
    letters = sorted(set(text))
    data = torch.tensor([letters.index(letter) for letter in text])
    model = GPT(len(letters), length, width, heads, layers)

    optimizer = torch_optimizers.Muon(model, lr=0.02, adam_lr_ratio=0.15)
    print(optimizer.plan())
    warm = max(1, steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / warm) * 0.5 * (1 + math.cos(math.pi * t / steps))
    )
    losses = []
    for step in range(steps):
        starts = torch.randint(len(data) - length - 1, (rows,))
        batch = torch.stack([data[start : start + length + 1] for start in starts])
        loss = cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if step % max(1, steps // 10) == 0:
            print(f"step {step:5d}: loss {losses[-1]:.3f}, rate {scheduler.get_last_lr()[0]:.4f}")

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "run.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        run = torch.load(path, weights_only=True)
        model.load_state_dict(run["model"])
        optimizer.load_state_dict(run["optimizer"])
    assert losses[-1] < losses[0], "the loss did not fall"


if __name__ == "__main__":
    main()
