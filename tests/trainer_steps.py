"""One step of Hugging Face's Trainer with examples/segformer_transformers.py, against gradients of its batches added by hand.

Run by test_trainer.py, as one process or as several ranks: ``python trainer_steps.py EXAMPLE FOLDER ACCUMULATION``. Each rank
leaves in FOLDER what the step changed, and the mean gradient of the batches that it saw.
"""

from __future__ import annotations

import copy
import os
import runpy
import sys

import torch
import transformers


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        for name in ("p", "drop_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of SegFormer's own loss and 0.1 times ProAC's."""
    model = copy.deepcopy(model).train()
    model._forward_hooks.clear()
    features = model.segformer(batch["pixel_values"], output_hidden_states=True).hidden_states
    logits = torch.nn.functional.interpolate(model.decode_head(features), batch["labels"].shape[1:], mode="bilinear")
    loss = torch.nn.functional.cross_entropy(logits, batch["labels"], ignore_index=255)
    (loss + 0.1 * model.proac(batch["labels"])).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def main(path: str, folder: str, accumulation: int) -> None:
    example = runpy.run_path(path)  # which trains three steps on these ranks
    model, seen = without_dropout(example["model"]), []
    before = copy.deepcopy(model)

    def collate(indices: list[int]) -> dict[str, torch.Tensor]:
        seen.append(example["collate"](indices))
        return seen[-1]

    arguments = transformers.TrainingArguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    transformers.Trainer(model, arguments, collate, range(8), optimizers=(optimizer, None)).train()

    parts = [gradients(before, batch) for batch in seen[:accumulation]]  # the loader looks ahead
    mean = {name: sum(part[name] for part in parts) / accumulation for name in parts[0]}
    old = dict(before.named_parameters())
    change = {name: (old[name] - parameter).detach() for name, parameter in model.named_parameters()}
    torch.save((change, mean), f"{folder}/{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
