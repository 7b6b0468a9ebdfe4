"""A torch function served on a device, always on the same number of rows: pinned buffers, one CUDA graph.

Takes a function of tensors and the shapes of a row; gives numpy arrays for numpy arrays. All arithmetic is in float32 without TF32:
autocast moves probabilities in the third digit, which changes decisions, and nets this small wait for launches, not for arithmetic. Every
call has the same shape, so the graph serves one decision and many; where a row stands among the others may still change its last digits
(libraries choose how to go about the ends of an array), so equality to the last bit of blocks and single batches is a promise of the
numba kernels on a CPU alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from catalog.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

LOG = logging.getLogger(__name__)
Device = Literal["auto", "cpu", "cuda"]
LEAST: int = 4  # rows; a device that has no room for these has none for the model


def device_named(wanted: Device) -> str:
    """"cpu" or "cuda": what `auto` finds. Raises InputError where "cuda" is wanted and there is none."""
    if wanted == "cpu":
        return "cpu"
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise InputError("--device cuda: there is no GPU that torch can use here; leave it out or choose cpu")
    return "cuda" if there else "cpu"


class OnDevice:
    """`make(device)` gives the function with its weights there; `inputs` are (shape, dtype) of a row of each argument, `output` the shape
    of a row of the float32 answer. `rows` at once; a device out of memory gets half as many, and so on, which is logged.

    On "cuda" (`graphs`) the first call captures a graph; where that fails the function runs without one, which is logged once.
    """

    def __init__(
        self, make: Callable[[str], Callable[..., Tensor]], inputs: Sequence[tuple[tuple[int, ...], Any]], output: tuple[int, ...],
        device: str, rows: int = 64, name: str = "model",
    ) -> None:  # fmt: skip
        self._make, self._shapes, self._output, self.device, self.rows, self._name = make, inputs, output, device, rows, name
        self.graph: Any = None
        self.graphs = device == "cuda"
        self._buffers: Any = None

    def __call__(self, *arrays: NDArray[Any]) -> NDArray[np.float32]:
        """`arrays` (n, ...) -> (n, ...) float32. Raises torch.OutOfMemoryError where not even LEAST rows fit."""
        import torch

        n, a = len(arrays[0]), 0
        out = np.empty((n, *self._output), np.float32)
        while a < n:
            try:
                b = min(a + self.rows, n)
                self._run([x[a:b] for x in arrays], out[a:b])
                a = b
            except torch.OutOfMemoryError:
                self.graph = self._buffers = None
                if self.rows // 2 < LEAST:
                    raise
                self.rows //= 2
                torch.cuda.empty_cache()
                LOG.warning("%s: the device is out of memory, %d decisions at once from now on", self._name, self.rows)
        return out

    def _run(self, arrays: Sequence[NDArray[Any]], out: NDArray[np.float32]) -> None:
        import torch

        with torch.inference_mode():
            if self._buffers is None:
                self._prepare()
            host, on, back, answer = self._buffers
            for h, d, x in zip(host, on, arrays):
                h[: len(x)] = torch.from_numpy(np.ascontiguousarray(x))
                d.copy_(h, non_blocking=True)
            if self.graph is not None:
                self.graph.replay()
            else:
                answer = self._function(*on)
            back.copy_(answer, non_blocking=True)
            if self.device == "cuda":
                torch.cuda.current_stream().synchronize()
            out[:] = back[: len(out)].numpy()

    def _prepare(self) -> None:
        """Buffers, pinned where the device is a GPU, and there the graph: both ends of every copy stay where they are."""
        import torch

        pinned, n = self.device == "cuda", self.rows
        self._function = self._make(self.device)
        host = [torch.zeros((n, *shape), dtype=kind, pin_memory=pinned) for shape, kind in self._shapes]
        on = [torch.zeros((n, *shape), dtype=kind, device=self.device) for shape, kind in self._shapes]
        back = torch.empty((n, *self._output), dtype=torch.float32, pin_memory=pinned)
        answer = None
        if self.graphs:
            try:
                answer = self._capture(on)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, AssertionError) as e:  # the latter from a torch without CUDA
                self.graph = None
                LOG.warning("%s: no CUDA graph (%s), it is launched piece by piece (said once)", self._name, e)
        self._buffers = host, on, back, answer

    def _capture(self, on: Sequence[Tensor]) -> Tensor:
        import torch

        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose their algorithms and take their workspace before the capture
            for _ in range(3):
                self._function(*on)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = self._function(*on)
        self.graph = graph
        return answer
