"""torchvision: DeepLabV3 on files laid out as Pascal VOC, with mixed precision. The three lines that ProAC adds are marked."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.datasets import VOCSegmentation, wrap_dataset_for_transforms_v2
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large
from torchvision.transforms import v2

from proac_cuda import ProACRegularizer  # 1

STEPS, CLASSES = 3, 5
device = "cuda" if torch.cuda.is_available() else "cpu"

folder = Path(tempfile.mkdtemp())  # stands for your files: images, and masks of classes with 255 where there is none
for part, suffix, shape in ("JPEGImages", "jpg", (96, 96, 3)), ("SegmentationClass", "png", (96, 96)):
    (folder / "VOCdevkit/VOC2012" / part).mkdir(parents=True)
    for index in range(2 * STEPS):
        values = np.random.randint(0, 255 if suffix == "jpg" else CLASSES, shape).astype(np.uint8)
        Image.fromarray(values).save(folder / f"VOCdevkit/VOC2012/{part}/{index}.{suffix}")
names = folder / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
names.parent.mkdir(parents=True)
names.write_text("\n".join(map(str, range(2 * STEPS))))

fill = {tv_tensors.Image: 0, tv_tensors.Mask: 255}  # without it corners become class 0
dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
transforms = v2.Compose([v2.ToImage(), v2.RandomRotation(10, fill=fill), v2.ToDtype(dtypes, scale=True)])
dataset = wrap_dataset_for_transforms_v2(VOCSegmentation(folder, transforms=transforms))

model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES).to(device)
proac = ProACRegularizer(model, layer="backbone", num_classes=CLASSES)  # 2
optimizer = torch.optim.SGD([*model.parameters(), *proac.parameters()], lr=0.01, momentum=0.9)

for step, (images, labels) in enumerate(DataLoader(dataset, batch_size=2, shuffle=True)):
    images, labels = images.to(device), labels.squeeze(1).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = model(images)["out"]
    loss = torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=255)
    loss = loss + 0.1 * proac(labels)  # 3
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
