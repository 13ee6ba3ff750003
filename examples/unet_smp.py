"""segmentation_models_pytorch: a U-Net on PNG files, the package's Dice loss and ProAC. ProAC's three lines are marked."""

import tempfile
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from proac_cuda import ProACRegularizer  # 1

STEPS, CLASSES = 3, 5

folder = Path(tempfile.mkdtemp())  # stands for your files: images, and masks of classes with 255 where there is none
for index in range(2 * STEPS):
    labels = np.random.randint(0, CLASSES, (4, 4)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
    labels[:2] = 255
    image = labels[..., None] % CLASSES * 40 + np.random.randint(0, 80, (64, 64, 3))
    Image.fromarray(image.astype(np.uint8)).save(folder / f"{index}_image.png")
    Image.fromarray(labels).save(folder / f"{index}_labels.png")


class Files(Dataset):
    """Images (3, H, W) and labels (H, W), int64."""

    def __len__(self):
        return 2 * STEPS

    def __getitem__(self, index):
        image, labels = (np.array(Image.open(folder / f"{index}_{part}.png")) for part in ("image", "labels"))
        return torch.from_numpy(image).movedim(-1, 0) / 255, torch.from_numpy(labels).long()


model = smp.Unet("resnet18", encoder_weights=None, classes=CLASSES)  # "imagenet" downloads the encoder's weights
proac = ProACRegularizer(model, layer="encoder", num_classes=CLASSES)  # 2; the deepest of the encoder's maps
optimizer = torch.optim.AdamW([*model.parameters(), *proac.parameters()], lr=1e-3)
dice = smp.losses.DiceLoss("multiclass", ignore_index=255)

for step, (images, labels) in enumerate(DataLoader(Files(), batch_size=2)):
    loss = dice(model(images), labels) + 0.1 * proac(labels)  # 3
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
