"""Hugging Face transformers: SegFormer from its configuration, with the Trainer. ProAC's three lines are marked."""

import tempfile

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments

from proac_cuda import ProACRegularizer  # 1

STEPS, CLASSES = 3, 5


class ProACTrainer(Trainer):
    """Adds ProAC to the model's own loss."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + 0.1 * self.accelerator.unwrap_model(model).proac(inputs["labels"])  # 3
        return (loss, outputs) if return_outputs else loss


config = SegformerConfig(
    num_labels=CLASSES, depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 128], decoder_hidden_size=64
)
model = SegformerForSemanticSegmentation(config)
# A part of the model: so the Trainer moves it, optimizes its head, and saves it. It counts parameters before the first batch:
# so the channels have to be said.
model.proac = ProACRegularizer(model, layer="segformer.stages.3", num_classes=CLASSES, in_channels=128)  # 2

data = [
    {"pixel_values": torch.rand(3, 64, 96), "labels": torch.randint(0, CLASSES, (64, 96))} for _ in range(2 * STEPS)
]
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=2, logging_steps=1, report_to="none", save_strategy="no"
    )
    result = ProACTrainer(model, arguments, train_dataset=data).train()
print(f"{STEPS} steps: mean loss {result.training_loss:.3f}")
