"""segmentation_models_pytorch: a U-Net, cross-entropy and ProAC. The three lines that ProAC adds are marked."""

import segmentation_models_pytorch as smp
import torch

from proac_cuda import ProACRegularizer  # 1

STEPS, CLASSES = 3, 5


def batches():
    """Stands for a DataLoader: images (B, 3, H, W), labels (B, H, W) in [0, CLASSES), 255 where there is none."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        labels = (
            torch.randint(0, CLASSES, (2, 4, 4), generator=generator).repeat_interleave(16, 1).repeat_interleave(16, 2)
        )
        labels[:, :2] = 255
        noise = torch.rand(2, 3, 64, 64, generator=generator)
        yield (labels % CLASSES / CLASSES)[:, None] + 0.3 * noise, labels


model = smp.Unet("resnet18", encoder_weights=None, classes=CLASSES)
proac = ProACRegularizer(model, layer="encoder", num_classes=CLASSES)  # 2; the deepest of the encoder's maps
optimizer = torch.optim.AdamW([*model.parameters(), *proac.parameters()], lr=1e-3)
cross_entropy = torch.nn.CrossEntropyLoss(ignore_index=255)

for step, (images, labels) in enumerate(batches()):
    loss = cross_entropy(model(images), labels)
    loss = loss + 0.1 * proac(labels)  # 3
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
