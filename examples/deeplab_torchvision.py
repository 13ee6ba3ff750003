"""torchvision: DeepLabV3, trained with mixed precision. The three lines that ProAC adds are marked."""

import torch
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

from proac_cuda import ProACRegularizer  # 1

STEPS, CLASSES = 3, 5
device = "cuda" if torch.cuda.is_available() else "cpu"


def batches():
    """Stands for a DataLoader: images (B, 3, H, W), labels (B, H, W) in [0, CLASSES), 255 where there is none."""
    for _ in range(STEPS):
        yield torch.rand(2, 3, 96, 96), torch.randint(0, CLASSES, (2, 96, 96))


model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES).to(device)
proac = ProACRegularizer(model, layer="backbone", num_classes=CLASSES)  # 2
optimizer = torch.optim.SGD([*model.parameters(), *proac.parameters()], lr=0.01, momentum=0.9)
cross_entropy = torch.nn.CrossEntropyLoss(ignore_index=255)

for step, (images, labels) in enumerate(batches()):
    images, labels = images.to(device), labels.to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = model(images)["out"]
    loss = cross_entropy(logits.float(), labels)
    loss = loss + 0.1 * proac(labels)  # 3
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
