"""MONAI: a 3-D U-Net on NIfTI files, with MONAI's transforms and its SupervisedTrainer. The three lines of ProAC are marked."""

import tempfile
from pathlib import Path

import monai
import nibabel
import numpy as np
import torch
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandRotated, ScaleIntensityd

from proac_cuda import ProACRegularizer  # 1

STEPS, CLASSES = 3, 5
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

folder = Path(tempfile.mkdtemp())  # stands for your files: volumes, and masks of classes
for index in range(2 * STEPS):
    labels = np.random.randint(0, CLASSES, (4, 4, 4), np.uint8).repeat(8, 0).repeat(8, 1).repeat(8, 2)
    nibabel.save(
        nibabel.Nifti1Image(labels + np.float32(np.random.rand(32, 32, 32)), np.eye(4)), folder / f"{index}_image.nii"
    )
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), folder / f"{index}_label.nii")
files = [{key: folder / f"{index}_{key}.nii" for key in ("image", "label")} for index in range(2 * STEPS)]
keys = ("image", "label")
transforms = [
    LoadImaged(keys),
    EnsureChannelFirstd(keys),
    ScaleIntensityd("image"),
    RandRotated(keys, range_x=0.3, prob=1, mode=("bilinear", "nearest")),
]
loader = monai.data.DataLoader(monai.data.CacheDataset(files, Compose(transforms), progress=False), batch_size=2)

model = monai.networks.nets.UNet(3, 1, CLASSES, channels=(8, 16, 32), strides=(2, 2)).to(device)
proac = ProACRegularizer(model, layer="model.1.submodule.1.submodule", num_classes=CLASSES, in_channels=32)  # 2
optimizer = torch.optim.AdamW([*model.parameters(), *proac.parameters()], lr=1e-3)
dice_ce = monai.losses.DiceCELoss(to_onehot_y=True, softmax=True)


def loss_function(logits, labels):
    """Labels are a MetaTensor (B, 1, H, W, D), float32."""
    return dice_ce(logits, labels) + 0.1 * proac(labels.squeeze(1).long())  # 3


handler = monai.handlers.StatsHandler(
    tag_name="loss", output_transform=monai.handlers.from_engine(["loss"], first=True)
)
monai.engines.SupervisedTrainer(device, 1, loader, model, optimizer, loss_function, train_handlers=[handler]).run()
