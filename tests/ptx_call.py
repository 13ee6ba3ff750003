"""A call of the CUDA kernels in the PTX interpreter: forward and backward, from nvcc's PTX, and their check."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import ptx_replay
from cuda_on_cpu import stages as kernels
from proac_cuda import stages
from proac_cuda.backends import reference
from stage_comparison import close, close_gradient, cosine_tolerance, gradient_tolerance


class Call:
    """Forward and backward of one case: on the CPU build, then in PTX. Arrays by name."""

    def __init__(
        self,
        case: dict[str, Any],
        temperature: float = 0.1,
        alpha: float = 0.0,
        num_negatives: int | None = None,
        learnable: bool = False,
        hardest: bool = True,
        by_stages: bool = False,
        multiprocessors: int = 132,
        shared_limit: int = 227 << 10,
        **options: Any,
    ) -> None:
        kernels.module.set_options(multiprocessors=multiprocessors, shared_limit=shared_limit)
        self.case, self.temperature, self.alpha = case, temperature, alpha
        self.replay = replay = ptx_replay.Replay(kernels.module, **options)
        array, x, labels, prototypes = kernels._array, case["features"], case["labels"], case["prototypes"]
        w, c = case["pixel_weight"], case["class_weight"]
        type_ = kernels._type(x)
        inputs = {
            "features": array(x),
            "labels": array(labels),
            "weight": array(w),
            "prototypes": array(prototypes),
            "classes": array(c),
        }
        for name, values in inputs.items():
            if values is not None:
                replay.add(name, values)
        self.thresholds = self.rng = thresholds = rng = None
        if num_negatives is not None:
            rng = np.array([12345, 7])
            replay.add("rng", rng)
            is_double = x.dtype == torch.float64
            thresholds = kernels.module.select_negatives(
                list(x.shape[2:]),
                is_double,
                inputs["labels"],
                inputs["weight"],
                rng,
                num_negatives,
                len(prototypes),
                255,
                False,
            )
            self._run("thresholds", thresholds)
            self.thresholds, self.rng = torch.from_numpy(thresholds), torch.from_numpy(rng)
        arrays = (inputs["features"], type_, inputs["labels"], inputs["weight"], inputs["prototypes"], thresholds, rng)
        before = len(replay.counters)
        if by_stages:
            statistics, positive, first = kernels.module.class_statistics(
                *arrays, temperature, 255, alpha > 0, hardest, False
            )
            self._run("statistics", statistics, positive=positive, first=first)
            sums = kernels.module.positive_sums(
                positive, inputs["labels"], inputs["weight"], statistics, 255, False, False
            )
            self._run("sums", sums)
            loss = kernels.module.reduce_loss(statistics, sums, inputs["classes"], alpha, stages.MEAN)
            self._run("loss", loss)
        else:
            loss, statistics, sums, first, positive = kernels.module.loss_forward(
                *arrays[:5], inputs["classes"], *arrays[5:],
                temperature, 255, False, alpha, stages.MEAN, hardest, False,
            )  # fmt: skip
            self._run("loss", loss, statistics=statistics, sums=sums, first=first, positive=positive)
        self.forward_launches = len(replay.counters) - before
        grad_loss = np.ones((), statistics.dtype)
        replay.add("grad_loss", grad_loss)
        self.grad = torch.empty_like(x)
        grad = array(self.grad)
        grad_prototypes = np.empty_like(inputs["prototypes"]) if learnable else None
        kernels.module.loss_gradients(
            *arrays,
            statistics,
            sums,
            inputs["classes"],
            grad_loss,
            temperature,
            255,
            False,
            alpha,
            stages.MEAN,
            False,
            grad,
            grad_prototypes,
        )
        more = {} if grad_prototypes is None else {"grad_prototypes": grad_prototypes}
        self._run("grad", grad, **more)
        self.backward_launches = len(replay.counters) - before - self.forward_launches
        bits = torch.from_numpy(replay.get("grad", grad).copy())
        self.grad = bits.view(torch.bfloat16) if x.dtype == torch.bfloat16 else bits
        self.out = {
            name: torch.from_numpy(replay.get(name, a).copy())
            for name, a in dict(
                statistics=statistics, positive=positive, first=first, sums=sums, loss=loss, **more
            ).items()
        }

    def _run(self, name: str, values: np.ndarray, **more: np.ndarray) -> None:
        for key, array in {name: values, **more}.items():
            self.replay.add(key, array, out=True)
        self.replay.run()

    def check(self) -> None:
        """Against the reference in float64, as tests/kernels/test_cuda_source.py checks the source."""
        x, labels, p, w = (self.case[name] for name in ("features", "labels", "prototypes", "pixel_weight"))
        w = None if w is None else w.double()
        c = None if self.case["class_weight"] is None else self.case["class_weight"].double()
        arguments = (x.double(), labels, w, p.double(), self.thresholds, self.rng)
        statistics, positive, first = reference.class_statistics(
            *arguments, self.temperature, 255, self.alpha > 0, True
        )
        at = cosine_tolerance(x.dtype, x.shape[1]) / self.temperature
        assert torch.equal(self.out["first"], first)
        close("positive", self.out["positive"], positive, at, 2e-6)
        close("log Z", self.out["statistics"][stages.LOG_Z], statistics[stages.LOG_Z], at, 2e-6)
        sums = reference.positive_sums(positive, labels, w, statistics, 255, False)
        loss = reference.reduce_loss(statistics, sums, c, self.alpha, stages.MEAN)
        close("loss", self.out["loss"], loss, 2 * at, 2e-6)
        learnable = "grad_prototypes" in self.out
        rest = (self.temperature, 255, False, self.alpha, stages.MEAN, True, learnable)
        one = torch.ones((), dtype=torch.float64)
        grad, grad_prototypes = reference.loss_gradients(*arguments, statistics, sums, c, one, *rest)
        close_gradient("gradient", self.grad, grad, gradient_tolerance(x.dtype, self.temperature))
        if learnable:
            tolerance = gradient_tolerance(x.dtype, self.temperature)
            close_gradient("prototypes' gradient", self.out["grad_prototypes"], grad_prototypes, tolerance)
        assert not self.replay.device.races, self.replay.device.races[:3]
        assert all(counters.uninitialised_loads == 0 for _, counters, _ in self.replay.counters)
