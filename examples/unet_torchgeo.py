"""torchgeo: a U-Net on GeoTIFF files, with torchgeo's data sets, sampler and task. The three lines of ProAC are marked."""

import tempfile
from pathlib import Path

import lightning
import numpy as np
import rasterio
from torch.utils.data import DataLoader
from torchgeo.datasets import RasterDataset, stack_samples
from torchgeo.samplers import RandomGeoSampler
from torchgeo.trainers import SemanticSegmentationTask

from proac_cuda import ProACRegularizer  # 1

STEPS, CLASSES = 3, 5

folder = Path(tempfile.mkdtemp())  # stands for your files: images, and masks of classes with 255 where there is none
place = rasterio.transform.from_origin(500_000, 5_000_000, 10, 10)
for name, bands, values, dtype in ("image", 3, 255, "float32"), ("mask", 1, CLASSES, "uint8"):
    profile = {"driver": "GTiff", "width": 128, "height": 128, "count": bands, "dtype": dtype, "crs": "EPSG:32632"}
    with rasterio.open(folder / f"{name}.tif", "w", transform=place, **profile) as file:
        file.write(np.random.randint(0, values, (bands, 128, 128)).astype(dtype))


class Images(RasterDataset):
    filename_glob = "image.tif"


class Masks(RasterDataset):
    filename_glob, is_image = "mask.tif", False


class Task(SemanticSegmentationTask):
    def configure_models(self):
        super().configure_models()
        self.proac = ProACRegularizer(self.model, "encoder", CLASSES, ignore_index=self.hparams["ignore_index"])  # 2

    def training_step(self, batch, batch_idx, dataloader_idx=0):
        loss = super().training_step(batch, batch_idx, dataloader_idx)
        return loss + 0.1 * self.proac(batch["mask"])  # 3


dataset = Images(folder) & Masks(folder)
loader = DataLoader(dataset, 2, sampler=RandomGeoSampler(dataset, 64, length=2 * STEPS), collate_fn=stack_samples)
trainer = lightning.Trainer(max_steps=STEPS, logger=False, enable_checkpointing=False)
trainer.fit(Task("unet", "resnet18", num_classes=CLASSES, ignore_index=255), loader, loader)
print(f"{trainer.global_step} steps: cross-entropy loss {trainer.callback_metrics['train_loss'].item():.3f}")
