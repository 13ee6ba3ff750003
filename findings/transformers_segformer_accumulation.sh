#!/usr/bin/env bash
# Hugging Face's Trainer trains SegFormer with gradients that grow with gradient_accumulation_steps, though the loss is a mean.
#
# Versions: transformers 5.24.0, accelerate 1.15.0, torch 2.14.1, CPU.
# Seen: one step on one image, eight times in the data, as batches of two: the change of the classifier's bias with 1, 2 and 4 accumulated batches
# is as 1 : 2 : 4, where the mean is the same. A model whose forward takes **kwargs is taken to divide its loss by num_items_in_batch
# itself, so that the Trainer does not divide; SegFormer takes **kwargs and does not either. Clipping and Adam hide most of it.
# What helps: model.accepts_loss_kwargs = False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0 accelerate==1.15.0 numpy
cat >"$folder/step.py" <<'PYTHON'
import sys

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments

config = SegformerConfig(
    num_labels=5,
    depths=[1] * 4,
    hidden_sizes=[16, 32, 64, 128],
    decoder_hidden_size=64,
    classifier_dropout_prob=0.0,
    drop_path_rate=0.0,
)
data = 8 * [{"pixel_values": torch.rand(3, 64, 64), "labels": torch.randint(0, 5, (64, 64))}]


def change(accumulation, helped):
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(config)
    if helped:
        model.accepts_loss_kwargs = False
    before = model.decode_head.classifier.bias.detach().clone()
    arguments = TrainingArguments(
        sys.argv[1],
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    return (model.decode_head.classifier.bias.detach() - before).norm().item()


found = {}
for helped in (False, True):
    changes = [change(accumulation, helped) for accumulation in (1, 2, 4)]
    found[helped] = [round(value / changes[0], 2) for value in changes]
print(found)
assert found == {False: [1.0, 2.0, 4.0], True: [1.0, 1.0, 1.0]}
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/step.py" "$folder/output" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
