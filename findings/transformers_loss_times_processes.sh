#!/usr/bin/env bash
# Hugging Face's Trainer trains SegFormer with gradients that are larger by processes x accumulated batches, though the loss is a mean.
#
# Versions: transformers 5.24.0, accelerate 1.15.0, torch 2.14.1, CPU, gloo.
# Seen: the gradient of the classifier's bias for eight times the same image, as one batch, as two accumulated ones, on two
# processes, and both: norms as 1 : 2 : 2 : 4, where all four are the same mean. A model whose forward takes **kwargs is taken to divide
# its loss by num_items_in_batch itself, so that the Trainer neither divides by the accumulated steps nor keeps to the mean over
# processes; SegFormer takes **kwargs and does not. Clipping at max_grad_norm and Adam hide most of it; a term that is added after
# compute_loss has another weight on each number of processes. What helps: model.accepts_loss_kwargs = False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0 accelerate==1.15.0 numpy
cat >"$folder/step.py" <<'PYTHON'
import os
import sys

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments

folder, accumulation, helped = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "helped"
torch.manual_seed(0)
config = SegformerConfig(
    num_labels=5,
    depths=[1] * 4,
    hidden_sizes=[16, 32, 64, 128],
    decoder_hidden_size=64,
    classifier_dropout_prob=0.0,
    drop_path_rate=0.0,
)
model = SegformerForSemanticSegmentation(config)
if helped:
    model.accepts_loss_kwargs = False
before = model.decode_head.classifier.bias.detach().clone()
data = 8 * [{"pixel_values": torch.rand(3, 64, 64), "labels": torch.randint(0, 5, (64, 64))}]
arguments = TrainingArguments(
    folder,
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
if os.environ.get("RANK", "0") == "0":
    print("step", (model.decode_head.classifier.bias.detach() - before).norm().item())
PYTHON
cat >"$folder/compare.py" <<'PYTHON'
import os
import socket
import subprocess
import sys

folder = sys.argv[1]


def step(processes, accumulation, helped):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    ranks = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
    command = [sys.executable, f"{folder}/step.py", f"{folder}/output", str(accumulation), "helped" if helped else ""]
    running = [
        subprocess.Popen(command, env={**shared, **rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in ranks
    ]
    printed = [process.communicate(timeout=600) for process in running]
    assert not any(process.returncode for process in running), printed
    return float(printed[0][0].rpartition("step ")[2])


found = {}
for helped in (False, True):
    steps = [step(*counts, helped) for counts in ((1, 1), (1, 2), (2, 1), (2, 2))]
    found[helped] = [round(value / steps[0], 2) for value in steps]
print(found)
assert found == {False: [1.0, 2.0, 2.0, 4.0], True: [1.0, 1.0, 1.0, 1.0]}
PYTHON
"$folder/venv/bin/python" "$folder/compare.py" "$folder"
