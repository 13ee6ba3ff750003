"""Training of examples/segformer_transformers.py, stopped and resumed as docs/using/frameworks.md says.

Run by test_trainer.py: ``python trainer_resume.py EXAMPLE FOLDER``.
"""

from __future__ import annotations

import copy
import runpy
import sys

import torch
import transformers

from proac_cuda import ProACRegularizer


class Compare(transformers.TrainerCallback):
    """What a resumed training starts from: the whole state that was saved."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state
        self.compared = 0

    def on_train_begin(self, arguments, state, control, model, **others):
        assert state.global_step == 1
        torch.testing.assert_close(dict(model.state_dict()), self.state, rtol=0, atol=0)
        self.compared += 1


def main(path: str, folder: str) -> None:
    example = runpy.run_path(path)
    options = {**example["options"], "save_steps": 1, "max_steps": 1}

    def trainer(model, callbacks=None, **more):
        arguments = transformers.TrainingArguments(folder, **{**options, **more})
        return transformers.Trainer(model, arguments, example["collate"], range(8), callbacks=callbacks)

    trainer(example["model"]).train()
    state = copy.deepcopy(dict(example["model"].state_dict()))
    checkpoint = f"{folder}/checkpoint-1"

    model = transformers.SegformerForSemanticSegmentation.from_pretrained(checkpoint)  # SegFormer's own tensors
    model.proac = ProACRegularizer(model, layer="segformer.stages.3", num_classes=5, in_channels=128)
    model.register_forward_hook(example["add_proac"], with_kwargs=True)
    model.accepts_loss_kwargs = False
    compare = Compare(state)
    resumed = trainer(model, [compare], max_steps=2)
    resumed.train(resume_from_checkpoint=checkpoint)  # ProAC's, the optimizer's and the step
    assert compare.compared == 1 and resumed.state.global_step == 2

    plain = transformers.SegformerForSemanticSegmentation.from_pretrained(checkpoint)  # inference needs no ProAC
    torch.testing.assert_close(
        dict(plain.state_dict()), {name: value for name, value in state.items() if not name.startswith("proac.")}
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
