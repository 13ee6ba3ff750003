"""Lightning: a module that trains a U-Net. The three lines that ProAC adds are marked."""

import lightning
import segmentation_models_pytorch as smp
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from proac_cuda import ProACRegularizer  # 1

STEPS, CLASSES = 3, 5


class Segmenter(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = smp.Unet("resnet18", encoder_weights=None, classes=CLASSES)
        self.proac = ProACRegularizer(self.model, layer="encoder", num_classes=CLASSES)  # 2

    def training_step(self, batch, index):
        images, labels = batch
        loss = cross_entropy(self.model(images), labels, ignore_index=255)
        loss = loss + 0.1 * self.proac(labels)  # 3
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)  # ProAC's head among them


data = TensorDataset(torch.rand(2 * STEPS, 3, 64, 64), torch.randint(0, CLASSES, (2 * STEPS, 64, 64)))
trainer = lightning.Trainer(
    max_steps=STEPS, accelerator="auto", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(Segmenter(), DataLoader(data, batch_size=2))
print(f"{trainer.global_step} steps: loss {trainer.callback_metrics['loss'].item():.3f}")
