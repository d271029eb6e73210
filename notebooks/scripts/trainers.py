"""Lightning's and Hugging Face's trainers with a chain by name, and what the chain knows in their logs.

python notebooks/scripts/trainers.py [--quick]
"""

import argparse
import tempfile

import lightning
import torch
import transformers
from torch import nn

from chainrule import callbacks, torch_optimizers


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch, _):
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.net(inputs)[:, 0], targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch_optimizers.Stam(self.parameters(), lr=1e-2)


def in_lightning(inputs: torch.Tensor, targets: torch.Tensor, epochs: int) -> None:
    rows = torch.utils.data.TensorDataset(inputs, targets)
    loader = torch.utils.data.DataLoader(rows, batch_size=16, shuffle=True)
    model = Regression()
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[callbacks.LightningMetrics(every=4)],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        max_epochs=epochs,
    )
    before = nn.functional.mse_loss(model.net(inputs)[:, 0], targets).item()
    trainer.fit(model, loader)
    after = nn.functional.mse_loss(model.net(inputs)[:, 0], targets).item()
    print(f"Lightning: {before:.4f} -> {after:.4f}")
    assert after < before, "the loss did not fall"


def in_transformers(folder: str, steps: int) -> None:
    config = transformers.GPT2Config(
        vocab_size=32,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    sentence = torch.arange(16) % 5
    rows = [{"input_ids": sentence, "labels": sentence}] * 64
    known = {}

    def write(values: dict[str, float], step: int) -> None:
        known[step] = values  # or to a file, a dashboard

    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            logging_steps=5,
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=rows,
        optimizer_cls_and_kwargs=(torch_optimizers.Casmo, {"lr": 1e-3}),
        callbacks=[callbacks.TransformersMetrics(callbacks.MetricsLogger(write, every=5))],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    last = known[max(known)]
    print(
        f"transformers: {losses[0]:.4f} -> {losses[-1]:.4f}, agar {last['chainrule/group0/agar']:.3f}"
    )
    assert losses[-1] < losses[0], "the loss did not fall"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: seconds")
    quick = parser.parse_args().quick
    lightning.seed_everything(0, verbose=False)
    inputs = torch.randn(128, 8)
    in_lightning(inputs, inputs[:, 0].sin(), 2 if quick else 50)
    with tempfile.TemporaryDirectory() as folder:
        in_transformers(folder, 20 if quick else 500)


if __name__ == "__main__":
    main()
