"""Hugging Face transformers: SegFormer and the stock Trainer, on one process or many. The three lines of ProAC are marked."""

import tempfile
from pathlib import Path

import numpy as np
import transformers
from PIL import Image

from proac_cuda import ProACRegularizer  # 1

STEPS, CLASSES = 3, 5

folder = Path(tempfile.mkdtemp())  # stands for your files: images, and masks of classes with 255 where there is none
for index in range(4 * STEPS):
    Image.fromarray(np.random.randint(0, 255, (80, 120, 3), np.uint8)).save(folder / f"{index}_image.png")
    Image.fromarray(np.random.randint(0, CLASSES, (80, 120), np.uint8)).save(folder / f"{index}_labels.png")
processor = transformers.SegformerImageProcessor(size={"height": 64, "width": 96})


def collate(indices):
    """pixel_values (B, 3, H, W), float32; labels (B, H, W), int64."""
    images, labels = ([Image.open(folder / f"{i}_{part}.png") for i in indices] for part in ("image", "labels"))
    return processor(images, labels, return_tensors="pt")


def add_proac(model, inputs, named, outputs):
    """A part of the model's pass and of its loss: so it is seen by DistributedDataParallel, accumulation and evaluation."""
    if "labels" in named:  # there are none in inference
        outputs.loss = outputs.loss + 0.1 * model.proac(named["labels"])  # 3
    return outputs


sizes = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 128], "decoder_hidden_size": 64}
model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=CLASSES, **sizes))
# A part of the model: so the Trainer moves, trains and saves it. It counts parameters first: so the channels have to be said.
model.proac = ProACRegularizer(model, layer="segformer.stages.3", num_classes=CLASSES, in_channels=128)  # 2
model.register_forward_hook(add_proac, with_kwargs=True)
model.accepts_loss_kwargs = False  # its loss is a mean: divided by the accumulated steps, not multiplied by the ranks

options = {"max_steps": STEPS, "per_device_train_batch_size": 2, "remove_unused_columns": False, "report_to": "none"}
arguments = transformers.TrainingArguments(str(folder / "output"), **options)
trainer = transformers.Trainer(model, arguments, collate, train_dataset=range(4 * STEPS), eval_dataset=range(4))
print(f"{STEPS} steps: mean loss {trainer.train().training_loss:.3f}; evaluated: {trainer.evaluate()['eval_loss']:.3f}")
