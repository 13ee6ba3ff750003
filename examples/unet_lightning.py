"""Lightning: a module that trains a U-Net on PNG files. The three lines that ProAC adds are marked."""

import tempfile
from pathlib import Path

import lightning
import numpy as np
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from proac_cuda import ProACRegularizer  # 1

STEPS, CLASSES = 3, 5


class Files(lightning.LightningDataModule):
    def prepare_data(self):  # stands for your files: images, and masks of classes with 255 where there is none
        self.folder = Path(tempfile.mkdtemp())
        for index in range(2 * STEPS):
            Image.fromarray(np.random.randint(0, 255, (64, 64, 3), np.uint8)).save(self.folder / f"image{index}.png")
            Image.fromarray(np.random.randint(0, CLASSES, (64, 64), np.uint8)).save(self.folder / f"labels{index}.png")

    def train_dataloader(self):
        read = lambda name: torch.from_numpy(np.array(Image.open(self.folder / f"{name}.png")))  # noqa: E731
        pairs = [(read(f"image{i}").movedim(-1, 0) / 255, read(f"labels{i}").long()) for i in range(2 * STEPS)]
        return torch.utils.data.DataLoader(pairs, batch_size=2)


class Segmenter(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = smp.Unet("resnet18", encoder_weights=None, classes=CLASSES)
        self.proac = ProACRegularizer(self.model, layer="encoder", num_classes=CLASSES, in_channels=512)  # 2

    def training_step(self, batch, index):
        images, labels = batch
        loss = cross_entropy(self.model(images), labels, ignore_index=255) + 0.1 * self.proac(labels)  # 3
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)  # ProAC's head among them


trainer = lightning.Trainer(max_steps=STEPS, devices=1, logger=False, enable_checkpointing=False)
trainer.fit(Segmenter(), Files())
print(f"{trainer.global_step} steps: loss {trainer.callback_metrics['loss'].item():.3f}")
