"""The Triton kernels compiled for GPUs that are not there: no spills, enough shared memory, AMD too; their PTX run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter is on: nothing is compiled", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import compiled_facts  # noqa: E402
from compiled_facts import Cell  # noqa: E402
from triton_offline import Compiler, Variants, instead_of_launching  # noqa: E402

import triton_replay  # noqa: E402
from proac_cuda.backends import reference  # noqa: E402
from proac_cuda.backends.triton import launch, tiles  # noqa: E402
from proac_cuda.backends.triton.report import reports  # noqa: E402
from proac_cuda.stages import REDUCTIONS  # noqa: E402
from stage_comparison import close_gradient, make_aligned_case  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error")  # what Triton will change, and says so, is decided here


def _check(cells, jobs=1):
    """No spills, shared memory that fits, tensor cores where there are some for the dtype."""
    rows = list(compiled_facts.triton_rows(cells, jobs))
    assert len({row.kernel for row in rows}) >= 10
    wrong = [row for row in rows if row.spilled or row.local_accesses]
    wrong += [row for row in rows if row.shared > compiled_facts.SHARED_LIMIT[row.architecture]]
    products = ("class_statistics_kernel", "feature_gradient_kernel", "gradient_by_classes_kernel")
    for row in rows:
        if row.architecture in tiles.FMA:
            used = not row.tensor_core  # should Triton use them one day, the tiles can be larger
        else:
            used = row.tensor_core or (row.dtype == "float64" and row.architecture != "sm_80")
        if row.kernel in products and not used:
            wrong.append(row)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", compiled_facts.ARCHITECTURES)
def test_no_spills(architecture):
    _check([Cell(architecture, "float16" if architecture in tiles.FMA else "bfloat16", 19)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_no_spills_without_tensor_cores(dtype):
    """At the largest number of classes of each tile size: registers hold S of all of them."""
    _check([Cell("sm_75", dtype, classes) for classes in (19, 96, 192, 256, 300)])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_86", "sm_120"])
def test_no_spills_with_every_option(architecture):
    _check([Cell(architecture, dtype, 19, everything=True) for dtype in ("bfloat16", "float32")])


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_spills_with_pixels_as_rows(dtype, channels_last):
    """On sm_90 the gradient of many classes is made by the matrix unit that takes 64 rows and reads shared memory."""
    cells = [Cell("sm_90", dtype, 150, everything=more, channels_last=channels_last) for more in (False, True)]
    rows = list(compiled_facts.triton_rows(cells, kernels=("gradient_by_classes_kernel",)))
    assert len(rows) == 2
    for row in rows:
        assert row.spilled == row.local_accesses == 0 and row.tensor_core and row.shared <= 113 << 10, row


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "everything"), [("sm_80", False), ("sm_100", True), ("sm_120", True)])
def test_no_spills_of_many_classes_in_float32(architecture, everything):
    """Where the most registers are taken: products in float32, features held. Triton 3.6 spilled without options on sm_80."""
    kernels = "class_statistics_kernel", "gradient_by_classes_kernel"
    cell = Cell(architecture, "float32", 150, everything=everything)
    rows = list(compiled_facts.triton_rows([cell], kernels=kernels))
    assert sorted({row.kernel for row in rows}) == sorted(kernels)
    assert all(row.spilled == row.local_accesses == 0 and row.tensor_core for row in rows), rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "kernel"),
    [
        (Cell("sm_80", "bfloat16", 19, everything=True, channels_last=True), "prototype_gradient_kernel"),
        (Cell("sm_90", "float32", 19, channels_last=True), "prototype_gradient_kernel"),
        (Cell("sm_90", "float64", 19), "merge_statistics_kernel"),
        (Cell("sm_100", "bfloat16", 150), "class_statistics_kernel"),
    ],
)
def test_no_spills_from_tile_to_tile(cell, kernel):
    """What stays in registers from tile to tile must not crowd out what is worked on: each of these spilled 8 to 24 bytes."""
    (row,) = compiled_facts.triton_rows([cell], kernels=(kernel,))
    assert row.spilled == row.local_accesses == 0, row


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", compiled_facts.ARCHITECTURES)
def test_no_spills_in_the_whole_table(architecture):
    """Sixty compilations of the large kernels for each architecture, in two processes."""
    dtypes = "float32", "bfloat16", "float16", "float64"
    _check(compiled_facts.cells_of([architecture], dtypes, [19, 150]), jobs=2)


@pytest.mark.parametrize("channels_last", [False, True])
def test_no_compilation_for_each_new_size(channels_last):
    """Batches, crops and label sizes of a training run: a kernel is compiled anew only where P turns odd."""
    cell = Cell("sm_90", "bfloat16", 19, 64, channels_last=channels_last)
    variants = Variants(cell.architecture)
    for batch in (1, 2, 3, 8):
        for height, width in ((32, 32), (33, 33), (128, 128), (97, 129), (64, 100), (1, 7)):
            for larger in (1, 4, 8):
                label_size = (height * larger - (larger > 1), width * larger - (larger > 1))
                size = batch, height, width
                compiled_facts.stage_launches(variants, cell, size, label_size)
    # digits; forward and backward; with the loss and without
    stages = {"count_digits_kernel": 3, "pick_digit_kernel": 4, "prepare_kernel": 2, "positive_sums_kernel": 2}
    for name, found in variants.found.items():
        assert len(found) <= 2 * stages.get(name, 1), (name, len(found))


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=pytest.mark.slow if dtype == "bfloat16" else pytest.mark.exhaustive)
        for dtype in ("float32", "bfloat16", "float16", "float64")
    ],
)
@pytest.mark.parametrize("architecture", ["gfx90a", "gfx942"])
def test_compiles_for_amd(architecture, dtype):
    compiler = Compiler(architecture)
    compiled_facts.stage_launches(compiler, Cell(architecture, dtype, 19, 64, everything=True))
    for compiled in compiler.launches:
        assert compiled.compiled.asm["hsaco"]
        assert compiled.compiled.metadata.shared <= 64 << 10, compiled.name


def _steps(run, features, labels, prototypes, real):
    """Forward and backward through the stages of ``run``: positive, statistics, loss, gradient."""
    statistics, positive, _ = run.class_statistics(
        features, labels, None, prototypes, None, None, 0.1, 255, False, False
    )
    sums = run.positive_sums(positive, labels, None, statistics, 255, False)
    loss = run.reduce_loss(statistics, sums, None, 0.0, 1)
    gradient, _ = run.loss_gradients(
        features, labels, None, prototypes, None, None, statistics, sums, None, torch.ones((), dtype=real),
        0.1, 255, False, 0.0, 1, True, False,
    )  # fmt: skip
    return positive, statistics, loss, gradient


@pytest.mark.parametrize(
    "classes", [pytest.param(19, marks=pytest.mark.slow), pytest.param(150, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ptx_gives_right_results_and_touches_each_sector_once(dtype, layout, classes):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 256, 64, 64, generator=generator).to(dtype).contiguous(memory_format=layout)
    labels = torch.randint(0, classes, (1, 128, 128), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    prototypes = torch.randn(classes, 256, generator=generator)
    simulator = triton_replay.Simulator()
    with instead_of_launching(simulator):
        positive, statistics, loss, gradient = _steps(launch, features, labels, prototypes, torch.float32)
    truth = _steps(reference, features.double(), labels, prototypes.double(), torch.float64)

    cosine_error = 1e-6 if dtype == torch.float32 else 2e-6
    assert (positive - truth[0]).abs().max() * 0.1 <= cosine_error
    assert ((statistics[0] - truth[1][0]).abs() <= cosine_error / 0.1 + 2e-6 * truth[1][0].abs()).all()
    assert abs(loss - truth[2]) <= cosine_error / 0.1 + 2e-6 * truth[2].abs()
    rounded = truth[3].to(dtype).double() - truth[3] if dtype != torch.float32 else torch.zeros(())
    tolerance = 1e-6 + 4e-5 if dtype == torch.float32 else 2e-4
    assert (gradient.double() - truth[3]).norm() <= tolerance * truth[3].norm() + rounded.norm()

    floor = features.numel() * features.element_size() / 32
    traffic = {name: arrays for name, _, arrays in simulator.counters}
    assert floor <= traffic["class_statistics_kernel"]["features"]["read_sectors"] <= 1.10 * floor
    (grad,) = (traffic[name] for name in ("feature_gradient_kernel", "gradient_by_classes_kernel") if name in traffic)
    assert floor <= grad["features"]["read_sectors"] <= 1.10 * floor
    assert floor <= grad["grad_features"]["write_sectors"] <= 1.10 * floor
    forward, backward, _ = reports("sm_80", dtype, 256, classes, False)
    for calculated, found in ((forward, traffic["class_statistics_kernel"]), (backward, grad)):
        assert found["anchors"]["read_sectors"] == pytest.approx(calculated.prototypes * floor, rel=0.01), calculated
    assert traffic["class_statistics_kernel"]["anchors"]["read_sectors"] <= 2.5 * floor, "prototypes, from the cache"
    assert grad["anchors"]["read_sectors"] <= 3.75 * floor
    assert all(counters.uninitialised_loads == 0 for _, counters, _ in simulator.counters)
    assert [name for name, _, _ in simulator.counters if name != "prepare_kernel"].count("class_statistics_kernel") == 1
    assert len(simulator.counters) == 5 + 2, "launches: forward 5 stage by stage, backward 2"


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ptx_forward_is_four_launches_and_equal_to_the_stages(reduction):
    """Three blocks of classes, several chunks: the last program to arrive merges them."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 16, 9, 30, generator=generator)
    labels = torch.randint(0, 70, (2, 18, 60), generator=generator)
    prototypes, class_weight = torch.randn(70, 16, generator=generator), torch.rand(70, generator=generator)
    alpha = 0.5 if reduction == "mean" else 0.0
    simulator = triton_replay.Simulator()
    with instead_of_launching(simulator):
        loss, statistics, sums, _ = launch.loss_forward(
            features, labels, None, prototypes, class_weight, None, None,
            0.1, 255, True, alpha, REDUCTIONS[reduction], False,
        )  # fmt: skip
        assert len(simulator.counters) == 4
        arguments = features, labels, None, prototypes, None, None, 0.1, 255, alpha > 0, False
        one_by_one, positive, _ = launch.class_statistics(*arguments)
        sums_alone = launch.positive_sums(positive, labels, None, one_by_one, 255, True)
        reduced = launch.reduce_loss(one_by_one, sums_alone, class_weight, alpha, REDUCTIONS[reduction])
    assert all(counters.uninitialised_loads == 0 for _, counters, _ in simulator.counters)
    assert torch.equal(statistics, one_by_one) and torch.equal(sums, sums_alone) and torch.equal(loss, reduced)
    truth = reference.class_statistics(*arguments)
    torch.testing.assert_close(sums, reference.positive_sums(truth[1], labels, None, truth[0], 255, True))
    torch.testing.assert_close(loss, reference.reduce_loss(truth[0], sums, class_weight, alpha, REDUCTIONS[reduction]))


def _reads(architecture, dtype, more_options):
    """What forward and the features' gradient read of 150 classes, by calculation: (features, prototypes) each."""
    return [(row.features, row.prototypes) for row in reports(architecture, dtype, 256, 150, more_options)[:2]]


@pytest.mark.parametrize("more_options", [False, True])
def test_reads_of_150_classes(more_options):
    """Over the features' bytes; features themselves are read once."""
    for architecture in ("sm_80", "sm_86", "sm_89"):
        assert _reads(architecture, torch.bfloat16, more_options) == [
            (1, 2.5),
            (1, 3.75 if architecture == "sm_80" else 5),
        ]
        assert _reads(architecture, torch.float32, more_options) == [(1, 2.5), (1, 3.75)]
    assert _reads("sm_90", torch.bfloat16, more_options) == [(1, 2.5), (1, 3.125 if more_options else 2.5)]
    assert _reads("sm_100", torch.bfloat16, more_options) == [(1, 5 if more_options else 2.5), (1, 5)]
    assert _reads("sm_120", torch.bfloat16, more_options) == [(1, 5), (1, 5)]
    for architecture in ("sm_90", "sm_100"):
        assert _reads(architecture, torch.float32, more_options) == [(1, 2.5), (1, 3.75)]
    assert _reads("sm_120", torch.float32, more_options) == [(1, 2.5), (1, 4.6875 if more_options else 3.4375)]


def _gradient(simulator, features, labels, prototypes, temperature, of_prototypes):
    """One gradient in the simulator: what the PTX gives, the truth, and the pixels' true similarities with their classes."""
    exact, one = (features.double(), labels, None, prototypes.double()), torch.ones(())
    statistics, positive, _ = reference.class_statistics(*exact, None, None, temperature, 255, False, False)
    sums = reference.positive_sums(positive, labels, None, statistics, 255, False)
    options = temperature, 255, False, 0.0, 1, not of_prototypes, of_prototypes
    truth = reference.loss_gradients(*exact, None, None, statistics, sums, None, one.double(), *options)
    with instead_of_launching(simulator):
        vectors = statistics.float(), sums.float(), None, one
        found = launch.loss_gradients(features, labels, None, prototypes, None, None, *vectors, *options)
    return found[of_prototypes], truth[of_prototypes], positive


def _gradient_in_the_simulator(dtype, spatial, classes, of_prototypes):
    """One gradient of random features of 256 channels: (features, what the PTX gives, the truth, the launches' counters)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 256, *spatial, generator=generator).to(dtype)
    labels = torch.randint(0, classes, (1, *spatial), generator=generator)
    prototypes = torch.randn(classes, 256, generator=generator)
    simulator = triton_replay.Simulator()
    found, truth, _ = _gradient(simulator, features, labels, prototypes, 0.1, of_prototypes)
    return features, found, truth, simulator.counters


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ptx_gradient_of_prototypes_reads_what_is_calculated(dtype):
    """Of 19 classes: 16-bit features once."""
    features, found, truth, counters = _gradient_in_the_simulator(dtype, (32, 32), 19, of_prototypes=True)
    assert (found.double() - truth).norm() <= (5e-5 if dtype == torch.float32 else 2e-4) * truth.norm()
    traffic = {name: arrays for name, _, arrays in counters}["prototype_gradient_kernel"]["features"]
    calculated = reports("sm_80", dtype, 256, 19, False)[2].features
    assert calculated == (1 if dtype == torch.bfloat16 else 3)
    floor = features.numel() * features.element_size() / 32
    assert traffic["read_sectors"] == pytest.approx(calculated * floor, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_ptx_gradient_with_pixels_as_rows(dtype, monkeypatch):
    """The tile of sm_90 as sm_80 compiles it: every prototype is read once for both products."""
    tile = tiles.backward_tiles(dtype, 256, 70, "sm_90")
    assert tile.PIXEL_ROWS and tile.BM == 128
    monkeypatch.setattr(tiles, "backward_tiles", lambda *_: tile)
    features, found, truth, counters = _gradient_in_the_simulator(dtype, (8, 40), 70, of_prototypes=False)
    rounded = (truth.to(dtype).double() - truth).norm()
    assert (found.double() - truth).norm() <= 2e-4 * truth.norm() + rounded
    _, launched, traffic = counters[-1]
    assert launched.uninitialised_loads == 0
    floor = features.numel() * features.element_size() / 32
    assert traffic["features"]["read_sectors"] == pytest.approx(floor, rel=0.01)
    assert traffic["grad_features"]["write_sectors"] == pytest.approx(floor, rel=0.01)
    tiles_of_pixels, bytes_of_prototypes = 3, 80 * 256 * 2 * 2  # 320 pixels; five blocks of 16 classes, in two parts
    assert traffic["anchors"]["read_sectors"] == tiles_of_pixels * bytes_of_prototypes / 32


@pytest.mark.slow
@pytest.mark.parametrize("classes", [19, 40])  # in one block; in two
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ptx_on_tensor_cores_that_truncate(dtype, classes):
    """Features on their prototypes, where truncated sums err to one side: over all of 512 channels it would be 4e-6."""
    case = make_aligned_case(dtype, 512, classes, pixels=64, noise=0.01)
    features, labels, prototypes = case["features"], case["labels"], case["prototypes"].float()
    simulator = triton_replay.Simulator(tensor_core="truncate")
    gradient, truth, true_positive = _gradient(simulator, features, labels, prototypes, 1.0, of_prototypes=False)
    with instead_of_launching(simulator):
        _, positive, _ = launch.class_statistics(features, labels, None, prototypes, None, None, 1.0, 255, False, False)
    assert (positive - true_positive).abs().max() <= (1e-6 if dtype == torch.float32 else 2e-6)
    close_gradient("features", gradient, truth, 5e-6 if dtype == torch.float32 else 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("num_negatives", [1, 50, 900, 10**6])
def test_ptx_draws_the_same_sets(num_negatives):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (2, 48, 48), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    arguments = (
        torch.zeros(2, 3, 24, 24),
        labels,
        None,
        torch.tensor([-12345678901234, 2**32 - 5]),
        num_negatives,
        7,
        255,
    )
    with instead_of_launching(triton_replay.Simulator()):
        drawn = launch.select_negatives(*arguments)
    assert torch.equal(drawn, reference.select_negatives(*arguments))
