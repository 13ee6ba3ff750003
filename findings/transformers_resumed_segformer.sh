#!/usr/bin/env bash
# Hugging Face's Trainer resumes SegFormer with 8 of its 124 tensors, and goes on; a subclass of the model loads 116 by from_pretrained.
#
# Versions: transformers 5.24.0, accelerate 1.15.0, torch 2.14.1, CPU.
# Seen: save_pretrained writes the tensors under the names of earlier versions ("decode_head.linear_c.0.proj.weight"), and from_pretrained
# reads them back, all 124. Trainer.train(resume_from_checkpoint=) reads the file without that renaming, not strictly: the 8 tensors whose
# names did not change are restored, the other 116 stay what they were before, while optimizer, schedule and step go on. The
# renaming goes by the class's name: in an empty subclass the decode head's 8 projections are new. What helps: make the model by
# from_pretrained(checkpoint), of the class itself, and resume then.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0 accelerate==1.15.0 numpy
cat >"$folder/resume.py" <<'PYTHON'
import sys

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainerCallback, TrainingArguments

folder = sys.argv[1]
config = SegformerConfig(num_labels=5, depths=[1] * 4, hidden_sizes=[16, 32, 64, 128], decoder_hidden_size=64)
data = [{"pixel_values": torch.rand(3, 64, 64), "labels": torch.randint(0, 5, (64, 64))} for _ in range(4)]


class Count(TrainerCallback):
    """How many tensors a training starts with that are those of the checkpoint."""

    def on_train_begin(self, arguments, state, control, model, **others):
        self.step, self.restored = state.global_step, equal(model)


def equal(model):
    return sum(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def trainer(model, steps, **more):
    arguments = TrainingArguments(folder, max_steps=steps, save_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True)
    return Trainer(model, arguments, train_dataset=data, **more)


class Subclass(SegformerForSemanticSegmentation):
    pass


first = SegformerForSemanticSegmentation(config)
trainer(first, 1).train()
expected = {name: value.clone() for name, value in first.state_dict().items()}
checkpoint = f"{folder}/checkpoint-1"
fresh, helped = Count(), Count()
trainer(SegformerForSemanticSegmentation(config), 2, callbacks=[fresh]).train(resume_from_checkpoint=checkpoint)
loaded = SegformerForSemanticSegmentation.from_pretrained(checkpoint)
found = {
    "tensors": len(expected),
    "resumed": (fresh.step, fresh.restored),
    "from_pretrained": equal(loaded),
    "subclass": equal(Subclass.from_pretrained(checkpoint)),
}
trainer(loaded, 2, callbacks=[helped]).train(resume_from_checkpoint=checkpoint)
found["both"] = (helped.step, helped.restored)
print(found)
assert found == {"tensors": 124, "resumed": (1, 8), "from_pretrained": 124, "subclass": 116, "both": (1, 124)}
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/resume.py" "$folder/output" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
