"""Tokens as a map: which grid they make, found from the labels' proportions; more than one, or none, is an error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor


def tokens_to_map(tokens: Tensor, labels: Tensor, layer: str) -> Tensor:
    r"""(B, N, C) as (B, C, \*grid): the one grid in the labels' proportions, exactly or nearly (patches cross the border).

    In front there may be a class token, a distillation token beside it, or four register tokens; not where the labels have
    one axis, since any number of tokens would do.
    """
    count, size = tokens.shape[1], tuple(labels.shape[1:])
    for proportions in (is_scaled, _is_patched):
        found = [
            (prefix, grid)
            for prefix in ((0, 1, 2, 5) if len(size) > 1 else (0,))
            for grid in _grids(count - prefix, len(size))
            if proportions(grid, size)
        ]
        if len(found) == 1:
            prefix, grid = found[0]
            laid_out: Tensor = tokens[:, prefix:].transpose(1, 2).unflatten(2, grid)
            return laid_out
        if found:
            break
    found_text = "; they could be " + ", or ".join(f"{grid} after {prefix} others" for prefix, grid in found)
    raise ValueError(
        f"layer {layer!r}: {count} tokens do not make one grid in the proportions of labels {tuple(labels.shape)}"
        f"{found_text if found else ''}; pass select= to make them a map (B, C, H, W)"
    )


def _grids(count: int, axes: int) -> Iterator[tuple[int, ...]]:
    """All sizes of that many axes with that many elements."""
    if axes == 1 and count > 0:
        yield (count,)
    elif axes > 1:
        for first in range(1, count + 1):
            if count % first == 0:
                yield from ((first, *rest) for rest in _grids(count // first, axes - 1))


def is_scaled(grid: Sequence[int], size: Sequence[int]) -> bool:
    """Whether both have the same proportions, exactly."""
    return all(a > 0 and a * size[0] == b * grid[0] for a, b in zip(grid, size, strict=True))


def _is_patched(grid: Sequence[int], size: Sequence[int]) -> bool:
    """Whether patches of some whole size cover the labels, those at the border left out, or padded, along all axes alike."""
    return any(
        tuple(grid) == covered
        for patch in range(1, max(size) + 1)
        for covered in (
            tuple(b // patch for b in size),
            tuple(-(-b // patch) for b in size),
            tuple(b // patch + 1 for b in size),  # convolutions padded by half a patch
        )
    )
