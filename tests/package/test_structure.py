"""The tree: which room may import which, without circles; signatures against the one definition of the options and ops."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

import proac_cuda
from proac_cuda.backends import reference
from proac_cuda.stages import autograd, ops, options, validation

ROOT = Path(proac_cuda.__file__).parent

#: What a room or a file of the front may import of the others: those below it.
MAY_IMPORT: dict[str, set[str]] = {
    "version": set(),
    "distributed": set(),
    "stages": set(),
    "initial_values": {"stages"},
    "prototypes": {"stages"},
    "backends": {"stages"},
    "statistics": {"stages", "backends"},
    "functional": {"stages", "backends", "statistics"},
    "reference": {"functional"},
    "compat": {"functional"},
    "module": {"stages", "backends", "statistics", "functional", "initial_values", "prototypes"},
    "regularizer": {"stages", "module"},
    "diagnostics": {"stages", "prototypes", "statistics"},
}
FRONT = {"__init__", "__main__"}  # which may import all


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name: str) -> Iterator[str]:
    """The package's own modules that a module imports, anywhere in it."""
    path = PATHS[name]
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        source = node.module or ""
        if node.level:
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*base, *([node.module] if node.module else [])])
        if source.split(".")[0] == "proac_cuda":
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield whole if whole in PATHS else source


def test_imports_go_one_way():
    for name in PATHS:
        room = name.split(".")[1] if "." in name else "__init__"
        if room not in FRONT:
            others = {(target.split(".") + ["__init__"])[1] for target in imports(name)} - {room}
            assert others <= MAY_IMPORT[room], f"{name} imports {sorted(others - MAY_IMPORT[room])}"


def test_no_circle_of_imports():
    TopologicalSorter({name: set(imports(name)) - {name} for name in PATHS}).prepare()  # raises CycleError


OF_A_CALL = {"features", "labels", "prototypes", "pixel_weight", "class_weight", "return_stats"}
OF_A_MODULE = {"self", "num_classes", "embedding_dim"}


def test_signatures_have_every_option_and_the_same_defaults():
    call = inspect.signature(proac_cuda.proac_loss).parameters
    module = inspect.signature(proac_cuda.ProACLoss.__init__).parameters
    assert set(call) == OF_A_CALL | set(options.CALL_OPTIONS)
    assert set(module) == OF_A_MODULE | set(options.ModuleOptions.__annotations__)
    assert set(inspect.signature(validation.check_options).parameters) == set(options.LOSS_OPTIONS)
    assert options.CALL_OPTIONS[: len(options.LOSS_OPTIONS)] == options.LOSS_OPTIONS
    for name in set(call) & set(module) - {"prototypes"}:
        assert call[name].default == module[name].default, name
        assert call[name].annotation == module[name].annotation, name
    for definition in (options.LossOptions, options.CallOptions, options.ModuleOptions):
        for name, kind in definition.__annotations__.items():
            assert kind.__forward_arg__ == module[name].annotation, name


def test_the_docstring_describes_every_option():
    arguments = inspect.getdoc(proac_cuda.proac_loss).partition("Args:")[2].partition("Returns:")[0]
    described = re.findall(r"^    (\w+): ", arguments, re.M)
    assert set(described) == set(inspect.signature(proac_cuda.proac_loss).parameters)


def test_the_documentation_shows_the_signature():
    shown = re.search(r"autofunction:: proac_loss\((.*)\)", (ROOT.parent / "docs" / "reference.md").read_text())[1]
    parameters = inspect.signature(proac_cuda.proac_loss).parameters.values()
    spelled = [p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace("'", '"') for p in parameters]
    assert shown == ", ".join([*spelled[:3], "*", *spelled[3:]])


def parameters_in_source(path: Path, function: str) -> tuple[list[str], bool]:
    """Names, and whether more may follow, of a function in a module that is not to be imported here."""
    found = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    arguments = next(node for node in found if node.name == function).args
    return [argument.arg for argument in arguments.args], arguments.vararg is not None


def parameters(function: Callable[..., Any]) -> tuple[list[str], bool]:
    """Names, without those that ops do not have, and whether more may follow."""
    found = inspect.signature(function).parameters.values()
    named = [p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("ops", "group")]
    return named, any(p.kind is p.VAR_POSITIONAL for p in found)


def schema_of(name: str) -> list[str]:
    text = {**ops.SCHEMAS, "loss_forward": ops.LOSS_FORWARD, "loss": ops.LOSS}[name]
    return re.findall(r"(\w+)(?:=\w+)?(?=[,)])", text[: text.index("->")])


@pytest.mark.parametrize("name", [*ops.SCHEMAS, "loss_forward"])
def test_stages_take_what_their_schema_says(name):
    schema = schema_of(name)
    takers = {
        "eager": parameters(getattr(reference if name in ops.SCHEMAS else autograd, name)),
        "fake": parameters(ops._FAKES[name]),
        "triton": parameters_in_source(ROOT / "backends" / "triton" / "launch.py", name),
    }
    for taker, (named, takes_more) in takers.items():
        assert named == (schema[: len(named)] if takes_more else schema), taker


def test_one_pass_takes_what_its_stages_take():
    """`loss_forward` is three stages in one: what it lacks would be lost where a backend has a kernel of its own for it."""
    stages = {name for stage in ("class_statistics", "positive_sums", "reduce_loss") for name in schema_of(stage)}
    between = {"positive", "statistics", "sums"}
    derived = {"pixel_anchor"}  # whether pixel_anchor_weight is above 0
    assert stages - between - derived == set(schema_of("loss_forward"))


def test_the_op_takes_the_tensors_and_then_the_options():
    assert schema_of("loss")[autograd.NUM_TENSORS :] == list(autograd.Options._fields)
