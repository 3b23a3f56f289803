"""When a forward is captured, and what is replayed: `StaticForward` runs steps of one memory through graphs of `model.static`.

A step falls into a bucket (`StaticShape`). The first step of a bucket runs the static function as it is, since many prompts bring a
length that never comes again; the second captures it; later ones replay. A bounded number of graphs is kept, the least used go first.
What the device does sits behind `Capture`: `CudaCapture` on a GPU, and `Rehearsal`, which runs the same logic where there is none.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from trimode.model.cache import KeyValueCache, Memory
from trimode.model.inputs import Inputs
from trimode.model.lora import Lora
from trimode.model.static import (
    MOST_INPUTS,
    Found,
    Static,
    StaticAttention,
    StaticKernel,
    StaticShape,
    fill_feed,
    run_static,
    shape_of,
    size_of_feed,
)
from trimode.model.transformer import Transformer

__all__ = ["MOST_GRAPHS", "Capture", "CudaCapture", "Graphs", "KernelChoice", "Rehearsal", "StaticForward"]

LOG = logging.getLogger(__name__)
MOST_GRAPHS = 64
"""Of one memory. What a graph holds beside the shared pool is small; this bounds what odd prompt lengths can pile up."""
_WARM_UPS = 2
_TIMINGS = 5

Run = Callable[[], None]


@runtime_checkable
class Capture(Protocol):
    """What a device does for graphs. Nothing is waited for here: what was found is read by whoever decodes (`decoding.reading`)."""

    def capture(self, function: Run, static: Static) -> Run:
        """Run a function of static tensors and return what repeats it on the same memory."""
        ...

    def seconds(self, function: Run) -> float:
        """What one run of it takes, captured."""
        ...

    def host_buffer(self, size: int) -> Tensor:
        """int64 [size] on the host, from which `send` copies without waiting."""
        ...

    def before_filling(self) -> None:
        """Returns once the last `send` has read its buffer."""
        ...

    def send(self, source: Tensor, target: Tensor) -> None:
        """One copy to the device."""
        ...


class CudaCapture:
    """CUDA graphs in one memory pool, which they may share because they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)
        self._sent = torch.cuda.Event()
        # the allocator gives a pool up with its last graph, and may refuse new ones for it then: this one stays
        self._anchor = self._graph(lambda: torch.zeros(1, device=device))

    def capture(self, function: Run, static: Static) -> Run:
        return self._graph(function).replay

    def _graph(self, function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        here, side = torch.cuda.current_stream(self._device), self._side
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            # Lazy things (cuBLAS handles and workspaces, kernels that are loaded when first used, programs that are compiled then)
            # happen in the warm-up, on the stream that captures.
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    function()
            here.wait_stream(side)
            try:
                # thread_local: other threads may allocate meanwhile
                with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                    function()
            finally:
                torch.cuda.set_stream(here)  # a capture that fails leaves its own stream behind as the current one
        return graph

    def seconds(self, function: Run) -> float:
        graph = self._graph(function)
        times = []
        with torch.cuda.device(self._device):
            for _ in range(_TIMINGS):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
        return median(times)

    def host_buffer(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64, pin_memory=True)

    def before_filling(self) -> None:
        self._sent.synchronize()

    def send(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source, non_blocking=True)
        self._sent.record(torch.cuda.current_stream(self._device))


class Rehearsal:
    """Stands in for a GPU: replays a function by calling it again, and insists that all it touches still lies where it lay."""

    def __init__(self) -> None:
        self.num_captures = 0

    def capture(self, function: Run, static: Static) -> Run:
        self.num_captures += 1
        function()
        addresses = static.addresses()

        def replay() -> None:
            assert static.addresses() == addresses, "a captured graph would now write to memory that is another's"
            function()

        return replay

    def seconds(self, function: Run) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def host_buffer(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64)

    def before_filling(self) -> None:
        pass

    def send(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)


class Graphs:
    """Captured functions by shape: none before its second run, a bounded number, the least recently used leave first."""

    def __init__(self, capture: Capture, most: int = MOST_GRAPHS) -> None:
        self._capture = capture
        self._most = most
        self._seen: set[StaticShape] = set()
        self._replays: OrderedDict[StaticShape, Run] = OrderedDict()
        self.refusal: str | None = None
        """Why this device captures nothing; None: it does."""

    def __len__(self) -> int:
        return len(self._replays)

    def __contains__(self, shape: StaticShape) -> bool:
        return shape in self._replays

    def run(self, shape: StaticShape, function: Run, static: Static, *, compiled: Run | None = None) -> None:
        """Run the function of this shape, by the fastest means there is. compiled: the same function, to be captured in its place."""
        replay = self._replays.get(shape)
        if replay is not None:
            self._replays.move_to_end(shape)
            replay()
        elif shape not in self._seen or self.refusal is not None:
            self._seen.add(shape)
            function()
        else:
            self._add(shape, function, static, compiled or function)

    def _add(self, shape: StaticShape, function: Run, static: Static, captured: Run) -> None:
        while len(self._replays) >= self._most:
            self._replays.popitem(last=False)
        try:
            self._replays[shape] = self._capture.capture(captured, static)
        except RuntimeError as error:
            # slower, and as right: a driver or a kernel that cannot be captured must not take the answers with it
            self.refusal = str(error).splitlines()[0]
            LOG.warning("No forward is captured from now on: %s", self.refusal)
            function()


class KernelChoice:
    """Which attention serves a shape: the one that was asked for, or the fastest of those that can, measured once."""

    def __init__(self, asked: StaticKernel | None, candidates: tuple[StaticKernel, ...] = ("sdpa", "flash")) -> None:
        """candidates: the first one serves every step, also before anything was measured. `flex` is no candidate by itself: it would
        compile a program for each shape, which takes seconds."""
        self._asked: StaticKernel | None = asked
        self._candidates: tuple[StaticKernel, ...] = candidates
        self._seen: set[StaticShape] = set()
        self.chosen: dict[StaticShape, StaticKernel] = {}

    def __call__(self, shape: StaticShape, seconds: Callable[[StaticShape], float]) -> StaticShape:
        """The shape with its kernel. `seconds`: what a shape's attention takes."""
        if self._asked is not None:
            return _with_kernel(shape, self._asked)
        # the kernel hangs on how wide a step is, and little on how much lies before it
        key = replace(shape, num_keys=0, num_asked=0, adapted="none")
        if key not in self._seen:
            self._seen.add(key)
            return _with_kernel(shape, self._candidates[0])
        if key not in self.chosen:
            self.chosen[key] = self._measure(shape, seconds)
        return _with_kernel(shape, self.chosen[key])

    def _measure(self, shape: StaticShape, seconds: Callable[[StaticShape], float]) -> StaticKernel:
        able: list[StaticKernel] = [k for k in self._candidates if _with_kernel(shape, k).kernel == k]
        if len(able) == 1:
            return able[0]
        found: dict[StaticKernel, float] = {}
        for kernel in able:
            try:
                found[kernel] = seconds(_with_kernel(shape, kernel))
            except RuntimeError as error:  # not for this device, dtype or head size
                LOG.info("Attention kernel %s does not run here: %s", kernel, str(error).splitlines()[0])
        return min(found, key=lambda kernel: found[kernel]) if found else self._candidates[0]


def _with_kernel(shape: StaticShape, kernel: StaticKernel) -> StaticShape:
    if kernel == "flash" and shape.sight == "any":
        kernel = "sdpa"
    # the others are told by the feed what each query sees: one graph for all views
    return replace(shape, kernel=kernel, sight=shape.sight if kernel == "flash" else "any")


class StaticForward:
    """Forwards of one model over one memory. Not for two threads at once."""

    def __init__(
        self,
        transformer: Transformer,
        memory: Memory,
        capture: Capture,
        choice: KernelChoice,
        *,
        lora: Lora | None = None,
        most_inputs: int = MOST_INPUTS,
        most_graphs: int = MOST_GRAPHS,
        compiled: bool = False,
    ) -> None:
        """lora: in the model's dtype. compiled: what is captured is first compiled whole, a minute or more for each shape."""
        self.memory = memory
        self.graphs = Graphs(capture, most_graphs)
        self._transformer = transformer
        self._lora = lora
        self._capture = capture
        self._choice = choice
        self._most_inputs = most_inputs
        self._compiles = compiled
        weight = transformer.embedding.weight
        self._dtype, self._device = weight.dtype, weight.device
        # a row has one input at least: none of B, T and the rows asked for exceeds the inputs
        most = 12 * most_inputs
        self._host = capture.host_buffer(most)
        self._feed = torch.zeros(most, dtype=torch.int64, device=self._device)
        self._found: dict[int, Found] = {}

    def __call__(self, inputs: Inputs, cache: KeyValueCache) -> Found | None:
        """What was found of the n inputs that are asked for, valid until the next forward. None: too wide a step, which nothing was
        done for."""
        shape = self._shape(inputs, cache)
        if shape is None:
            return None
        num_asked = len(inputs.asked)
        self._capture.before_filling()
        size = size_of_feed(shape)
        fill_feed(self._host[:size].numpy(), shape, inputs, cache)
        self._capture.send(self._host[:size], self._feed[:size])
        shape = self._choice(shape, self._attention_seconds)
        static = Static(self._feed[:size], self._found_for(shape.num_asked), self.memory)
        given = (self._transformer, self._lora, shape, static)
        compiled = partial(self._run_compiled, *given) if self._compiles else None
        self.graphs.run(shape, partial(run_static, *given), static, compiled=compiled)
        found = static.found
        return Found(found.hidden[:num_asked], found.logits[:num_asked], found.numbers[:, :num_asked])

    def is_captured(self, inputs: Inputs, cache: KeyValueCache) -> bool:
        """Whether a step like this one replays a graph now."""
        shape = self._shape(inputs, cache)
        return shape is not None and self._choice(shape, self._attention_seconds) in self.graphs

    def _shape(self, inputs: Inputs, cache: KeyValueCache) -> StaticShape | None:
        shape = shape_of(inputs, cache, self._most_inputs)
        return shape if shape is None or self._lora is not None else replace(shape, adapted="none")

    @staticmethod
    def _run_compiled(transformer: Transformer, lora: Lora | None, shape: StaticShape, static: Static) -> None:
        # one program a shape is what is wanted, and the compiler takes more than a few of one function for a mistake
        limits = {"recompile_limit": 4 * MOST_GRAPHS, "accumulated_recompile_limit": 64 * MOST_GRAPHS}
        with torch._dynamo.config.patch(limits):
            torch.compile(run_static, dynamic=False, fullgraph=True)(transformer, lora, shape, static)

    def _found_for(self, num_asked: int) -> Found:
        if num_asked not in self._found:
            config = self._transformer.config
            self._found[num_asked] = Found(
                torch.zeros(num_asked, config.width, dtype=self._dtype, device=self._device),
                torch.zeros(num_asked, config.vocab_size, dtype=self._dtype, device=self._device),
                torch.zeros(3, num_asked, dtype=torch.float64, device=self._device),
            )
        return self._found[num_asked]

    def _attention_seconds(self, shape: StaticShape) -> float:
        """Of all layers, for the step that is in the feed; whatever it writes, the step itself overwrites."""
        config = self._transformer.config
        N, K = shape.num_inputs, config.head_size
        q, k, v = (
            torch.ones(N, heads, K, dtype=self._dtype, device=self._device)
            for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        )
        feed = self._feed[: size_of_feed(shape)]

        def attention() -> None:
            attend = StaticAttention(shape, feed, self.memory, num_heads=config.num_heads, dtype=self._dtype)
            for layer in range(config.num_layers):
                attend(layer, q, k, v)

        return self._capture.seconds(attention)
