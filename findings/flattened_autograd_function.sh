#!/usr/bin/env bash
# An autograd.Function over a custom op loses its gradient where a tool flattens the function away.
#
# Versions: torch 2.14.1 (seen with 2.10.0 and 2.15.0 too). A function whose forward calls an op registered by torch.library, with a
# fake but without an autograd kernel, and whose backward is written out.
# Seen: the eager and the compiled gradient of s x + (s x)^2 is right, [3, 10, 21]. The gradient of the module that torch.export makes
# lacks the function's part, [1, 2, 3]: a warning at the first backward pass, no error. torch.func.grad raises, since the function has
# no setup_context, but torch.compile(torch.func.grad(f)) gives zeros.
# What helps: an autograd kernel of the op itself, which the dispatcher finds wherever the op is called.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat > "$folder/try.py" <<'PYTHON'
import warnings

import torch

warnings.simplefilter("ignore")
library = torch.library.Library("finding", "DEF")
library.define("square(Tensor x) -> Tensor")
library.impl("square", lambda x: torch.from_numpy(x.detach().numpy() ** 2), "CPU")
torch.library.register_fake("finding::square", torch.empty_like, lib=library)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.ops.finding.square(x)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        return (self.scale * x).sum() + Square.apply(self.scale * x).sum()


x = torch.tensor([1.0, 2.0, 3.0])


def gradient(model, run):
    run(x).backward()
    return next(model.parameters()).grad.tolist()


eager, compiled = Model(), Model()
exported = torch.export.export(Model(), (x,)).module()
found = {
    "eager": gradient(eager, eager),
    "compiled": gradient(compiled, torch.compile(compiled, backend="aot_eager")),
    "exported": gradient(exported, exported),
}


def squares(x):
    return Square.apply(x).sum()


try:
    found["func.grad"] = torch.func.grad(squares)(x).tolist()
except RuntimeError as error:
    found["func.grad"] = "raises" if "setup_context" in str(error) else str(error)
found["compiled func.grad"] = torch.compile(torch.func.grad(squares), backend="aot_eager")(x).tolist()
print(torch.__version__, found)
assert found == {
    "eager": [3.0, 10.0, 21.0],
    "compiled": [3.0, 10.0, 21.0],
    "exported": [1.0, 2.0, 3.0],
    "func.grad": "raises",
    "compiled func.grad": [0.0, 0.0, 0.0],
}
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
