"""Tensors that a module was made with, and whether they are still there when it is used.

Frameworks make a model without memory (the meta device, ``to_empty()``, Hugging Face's ``from_pretrained``), and fill it from
a checkpoint. What the checkpoint lacks is then whatever the memory held: finite numbers, as often as not. So each tensor is
looked at once, at the first use after anything that could have left it empty. What tells is how it came to be as it is:

- "made": as the module made it;
- "written": in place since then, by an optimizer, an average of models, a broadcast;
- "replaced": another tensor was assigned;
- "loaded": by ``load_state_dict``;
- "lost": its values were left behind, by ``to_empty()`` or on the meta device.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .stages.tracing import constant_while_tracing, untraced
from .stages.validation import has_values, warn_once

EPSILON = 1e-12  # a row of this norm or less has no direction
UNIT_TOLERANCE = 1e-3  # of a norm of 1, which rounding to float16 or bfloat16 does not leave

_keys = itertools.count(1)
_to_look_at: weakref.WeakValueDictionary[int, KeepsInitialValues] = weakref.WeakValueDictionary()


class _Seen(NamedTuple):
    """A tensor as it was after the last event."""

    history: str  # see above
    tensor: Tensor
    version: int


class KeepsInitialValues(nn.Module):
    """A module that looks, once after each event, whether its tensors hold values that someone put there.

    A subclass calls :meth:`_remember` at the end of its ``__init__``, gives :meth:`_why_empty`, and starts its ``forward``
    with :meth:`_look_if_needed`.
    """

    _initial: dict[str, Tensor]
    _unseen: dict[str, _Seen]
    _look_key: int = 0  # 0: there is nothing to look at; torch.compile guards on it
    _made_on_meta: bool = False

    def _remember(self) -> None:
        """Keep what the tensors hold now; they are looked at before the first use."""
        tensors = (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False))
        self._initial = {name: tensor.detach().clone() for name, tensor in tensors}
        self._made_on_meta = torch.empty(0).device.type == "meta"
        self._unseen = {}
        self._note(dict.fromkeys(self._initial, "made"))

    def _why_empty(self, name: str, tensor: Tensor, history: str) -> str | None:
        """What shows that nobody filled a tensor which is not as it was made, or None."""
        raise NotImplementedError

    def _is_restored(self, name: str) -> bool:
        """Whether an empty tensor gets its initial values again, with a warning; else it is an error."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Every tensor as it was when the module was made; for use after ``to_empty()``."""
        for name in self._tensors():
            self._restore(name)
        self._unseen = {}
        self._look_key = 0

    def _restore(self, name: str) -> None:
        initial, tensor = self._initial[name], getattr(self, name)
        if has_values(tensor) and not has_values(initial):
            raise ValueError(
                f"{name}: made on the meta device, without values, so that there is nothing to go back to: make it under "
                f'torch.device("cpu"), load a checkpoint that has it, or assign module.{name}'
            )
        with torch.no_grad():
            tensor.copy_(initial)

    # What happened to the tensors

    def _tensors(self) -> dict[str, Tensor]:
        """What the module holds now under the names that it was made with; a buffer may have been set to None."""
        tensors = ((name, getattr(self, name)) for name in self._initial)
        return {name: tensor for name, tensor in tensors if tensor is not None}

    def _history(self, name: str, tensor: Tensor) -> str:
        """What happened to a tensor up to now; "seen" where it has been looked at since."""
        if name not in self._unseen:
            return "seen"
        seen = self._unseen[name]
        if tensor is not seen.tensor:
            return "replaced"
        return seen.history if _version(tensor) == seen.version else "written"

    def _histories(self) -> dict[str, str]:
        return {name: self._history(name, tensor) for name, tensor in self._tensors().items()}

    def _note(self, histories: dict[str, str]) -> None:
        """Have tensors looked at before the next use, unless they have been already."""
        tensors = self._tensors()
        self._unseen = {
            name: _Seen(history, tensors[name], _version(tensors[name]))
            for name, history in histories.items()
            if history != "seen" and name in tensors
        }
        self._look_key = next(_keys) if self._unseen else 0
        if self._look_key:
            _to_look_at[self._look_key] = self

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsInitialValues:
        """As nn.Module's: a move keeps the values, ``to_empty()`` and the meta device do not."""
        histories, before = self._histories(), {name: tensor.detach() for name, tensor in self._tensors().items()}
        super()._apply(function, recurse)
        lost = {name: "lost" for name, tensor in self._tensors().items() if _lost(before[name], tensor)}
        self._note({**histories, **lost})
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        histories = self._histories()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        self._note({name: "loaded" if prefix + name in state_dict else history for name, history in histories.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> KeepsInitialValues:
        if (
            self._look_key
        ):  # first, since a copy may be written to in ways that leave no trace, as averages of models are
            with contextlib.suppress(ValueError):  # which the copy raises when it is called
                self._look()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy({**self.__dict__, "_unseen": {}}, memo))
        copied._note(self._histories())
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_unseen": self._histories(), "_look_key": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_unseen": {}})
        self._note(state.get("_unseen", {}))

    # Looking

    def _look_if_needed(self) -> None:
        """To be called before the tensors are used."""
        if torch.compiler.is_compiling():
            _look_while_tracing(self._look_key)
        elif self._look_key:
            with untraced():
                self._look()

    def _look(self) -> None:
        """Restore what nobody filled, or raise for it. It synchronises; not while a CUDA graph is captured."""
        tensors = {name: tensor for name, tensor in self._tensors().items() if name in self._unseen}
        if not all(_can_be_read(tensor) for tensor in tensors.values()):
            return
        self._note({name: self._resolved(name, tensor) for name, tensor in tensors.items()})
        self._made_on_meta = False  # whoever assigns tensors from now on knows what they are
        for name, tensor in tensors.items():
            initial, history = self._initial[name], self._unseen[name].history
            # from_pretrained(dtype=...) assigns tensors of that dtype
            if tensor.dtype != initial.dtype and history != "replaced":
                rounded = has_values(initial) and _same(tensor, initial.to(tensor.dtype))
                tensor = self._set(name, (initial if rounded else tensor).to(tensor.device, initial.dtype))
            if has_values(initial) and _same(tensor, initial):
                history = "made"
            if (reason := self._why_empty(name, tensor, history)) is not None:
                self._refill(name, tensor, history, reason)
        self._unseen = {}
        self._look_key = 0

    def _refill(self, name: str, tensor: Tensor, history: str, reason: str) -> None:
        """Restore a tensor that nobody filled, or raise for it."""
        initial = self._initial[name]
        if has_values(initial) and not self._is_restored(name):
            raise ValueError(
                f"{name}: {reason}. Nobody filled it after to_empty(), or after it was made on the meta device and the "
                "checkpoint did not have it: call reset_parameters(), which goes back to what the module was made with, "
                f"load a checkpoint that has it, or assign module.{name}"
            )
        if history == "replaced" and name in self._buffers:
            self._set(name, initial.to(tensor.device, copy=True))  # the other tensor is somebody's own
        else:
            self._restore(name)
        warn_once(
            f"restored {name}",
            f"{type(self).__name__}: its {name} are again what it was made with, since nobody filled them ({reason}) after the "
            "module was made, moved, emptied by to_empty(), or loaded from a checkpoint without them. To use others, pass "
            f"{name}=, or load them by load_state_dict",
        )

    def _resolved(self, name: str, tensor: Tensor) -> str:
        """A history in which a loader that works by assignment has loaded a tensor, or left it empty."""
        history = self._history(name, tensor)
        if history == "replaced" and getattr(tensor, "_is_hf_initialized", False):  # from_pretrained found it
            return "loaded"
        return "lost" if history == "replaced" and self._made_on_meta else history

    def _set(self, name: str, values: Tensor) -> Tensor:
        """Other values, or another dtype, for a tensor; a Parameter stays the one that the optimizer has."""
        if name in self._parameters:
            getattr(self, name).data = values
        else:
            self._buffers[name] = values
        tensor: Tensor = getattr(self, name)
        return tensor


@constant_while_tracing
def _look_while_tracing(key: int) -> bool:
    """A look at the real tensors while torch.compile traces, which takes no part in the graph."""
    module = _to_look_at.get(key)
    if module is not None:
        module._look()
    return True


def _can_be_read(tensor: Tensor) -> bool:
    """Whether there are values to look at, now."""
    if not has_values(tensor) or hasattr(tensor, "to_local"):  # a DTensor is refused with the other arguments
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # an argument of torch.func's, not the module's own
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    first, second = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(first, second)


def _lost(before: Tensor, after: Tensor) -> bool:
    """Whether a tensor's values did not come along."""
    if "meta" in (before.device.type, after.device.type):
        return True
    if hasattr(after, "to_local") or not (has_values(before) and has_values(after)):
        return False
    return not _same(before, after)


def why_no_direction(rows: Tensor, unit: bool) -> str | None:
    """The first row that is NaN, has no direction or, where rows are to be ``unit`` vectors, is none."""
    norms = rows.detach().double().norm(dim=1)
    good = (norms - 1).abs() <= UNIT_TOLERANCE if unit else norms > EPSILON
    if bool(good.all()):
        return None
    row = int(good.logical_not().int().argmax())
    return f"row {row} has norm {norms[row].item():.3g}"
