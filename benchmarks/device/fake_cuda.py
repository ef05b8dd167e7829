"""A GPU that computes nothing: fake CUDA tensors (torch's FakeTensorMode), and stand-ins for graphs, events and Triton.

What the engine does on a GPU's host side runs as it is, and what only a card would complain of is noted in `faults`:
a launch that mixes devices or types it cannot take, a kernel that would be compiled while a graph is captured, an
operation that a capture forbids, a host buffer that is touched before its transfer has ended. Draws and rewards are
made up. It patches torch for good, so it belongs in a process of its own.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from stars import buffers, pacing
from stars.model.adapters import AdaptedCheckpoint
from stars.model.checkpoint import Checkpoint
from stars.target import CPU

CAPTURABLE = {"aten.slice.Tensor", "aten.view.default", "aten.t.default", "aten.select.int", "aten.mm.out",
              "aten.mm.dtype_out", "aten.addmm.out", "prim.device.default", "aten.unsqueeze.default",
              "aten.alias.default", "aten.view.dtype", "aten.detach.default",
              # Of a ranking: small tensors, a copy, and torch's selection, none of which asks the device anything.
              "aten.amax.default", "aten.sub.Tensor", "aten.exp.default", "aten.mul.Tensor", "aten.sum.dim_IntList",
              "aten.log.default", "aten.arange.default", "aten.lt.Tensor", "aten.add.out", "aten.copy_.default",
              "aten.bitwise_right_shift_.Tensor_Scalar", "aten.bitwise_and_.Scalar", "aten.bitwise_xor_.Tensor",
              "aten.bitwise_left_shift_.Tensor_Scalar", "aten.add_.Tensor", "aten.topk.default", "aten.gather.default",
              "aten.gt.Scalar", "aten.bitwise_and.Tensor", "aten.abs.default", "aten.ne.Scalar", "aten.mul.Tensor",
              "aten.eq.Tensor", "aten.div.Tensor", "aten.ge.Tensor", "aten.eq.Scalar", "aten.bitwise_or.Tensor",
              "aten.bitwise_and_.Tensor", "aten.fill_.Scalar", "aten.where.self", "aten.where.ScalarOther",
              "aten.where.ScalarSelf", "aten._to_copy.default", "aten.scalar_tensor.default", "aten.full.default",
              # Of what ends a reward head.
              "aten.relu_.default", "aten.mul.out", "aten.sum.IntList_out", "aten._softmax.out", "aten.softmax.int_out",
              "aten.sigmoid.out"}
"""Operations of torch that a capture may meet: views, products into given memory, rankings and reward heads."""
MAPPED = {("finish_kernel", "ended")}
"""Parameters of kernels that may be given pinned memory of the host."""
LAUNCH_OPTIONS = {"num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_pdl"}

faults: list[str] = []
events: Counter[str] = Counter()  # launches, replays, captures, compiled kernels, waits, transfers
launched: Counter[str] = Counter()  # outside of captures, by kernel
mode = FakeTensorMode(allow_non_fake_inputs=True)
draw = np.random.default_rng(0)
on_variant: Callable[[JITFunction, tuple, dict], None] | None = None  # told of every kernel to be compiled
_capturing = False
_compiled: set = set()


class Event:
    """Every stretch of work is over as soon as it is waited for."""

    def __init__(self, enable_timing: bool = False):
        pass

    def record(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 1.0

    def synchronize(self) -> None:
        events["wait"] += 1


class Stream:
    """Streams wait for one another, not the host for them."""

    def wait_stream(self, other: Stream) -> None:
        events["stream wait"] += 1


class Graph:
    """Counts captures and replays."""

    def capture_begin(self, pool=None, capture_error_mode="global") -> None:
        global _capturing
        assert not _capturing
        _capturing = True
        events["capture"] += 1

    def capture_end(self) -> None:
        global _capturing
        _capturing = False

    def replay(self) -> None:
        events["replay"] += 1


class Operations(TorchDispatchMode):
    """Watches what torch is asked for during a capture."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if _capturing and str(function) not in CAPTURABLE:
            faults.append(f"{function} during a capture")
        return function(*args, **(kwargs or {}))


def launch(self: JITFunction, *args, grid, warmup, **kwargs) -> None:
    """In place of a kernel's launch: its arguments are all there, on the device, and compiled for before a capture."""
    name, parameters = self.fn.__name__, {parameter.name: parameter for parameter in self.params}
    given = dict(zip(parameters, args, strict=False)) | {key: kwargs[key] for key in kwargs if key in parameters}
    if set(parameters) - set(given) or set(kwargs) - set(parameters) - LAUNCH_OPTIONS:
        faults.append(f"{name} was given {sorted(given)} and {sorted(kwargs)}")
    special = []
    for key, value in given.items():
        parameter = parameters[key]
        if isinstance(value, torch.Tensor):
            offset = value.storage_offset() * value.element_size()
            there = value.device.type == "cuda" or (name, key) in MAPPED
            if not there or offset % 16:
                faults.append(f"{name}: {key} is on {value.device}, {offset % 16} bytes from a multiple of 16")
            special.append((key, value.dtype))
        elif parameter.is_constexpr or value is None:  # which Triton compiles in
            special.append((key, value))
        elif isinstance(value, int) and not isinstance(value, bool):
            special.append((key, "int") if parameter.do_not_specialize else (key, value == 1, value % 16 == 0))
        elif not isinstance(value, float):
            faults.append(f"{name}: {key} is {type(value).__name__}")
    sizes = grid(given) if callable(grid) else grid
    if not all(isinstance(size, int) and 0 < size < limit for size, limit in zip(sizes, (2**31, 65536, 65536))):
        faults.append(f"{name}: a grid of {sizes}")
    kind = (name, tuple(special), tuple((option, kwargs[option]) for option in sorted(LAUNCH_OPTIONS & set(kwargs))))
    if _capturing and kind not in _compiled:
        faults.append(f"{name} is compiled during a capture")
    if on_variant is not None and kind not in _compiled:
        on_variant(self, args, kwargs)
    events["compile"] += kind not in _compiled
    _compiled.add(kind)
    events["launch"] += not _capturing
    launched[name] += not _capturing


class FakeBuffers(buffers.Buffers):
    """Real memory on the host, fake memory on the device, and a note of who may touch the host's."""

    def __init__(self, target, /, zeroed=True, hosts=1, **fields):
        self._sent, self._busy, self._fetched = Event(), [False] * hosts, [False] * hosts
        with unset_fake_temporarily():
            self._host = buffers.Buffers(CPU, hosts=hosts, **fields)._host
        self._device = {name: torch.empty(shape, dtype=dtype, device=target.device)
                        for name, (dtype, shape) in fields.items()}

    def host(self, name: str, block: int = 0) -> np.ndarray:
        if self._busy[block]:
            faults.append(f"the host touches {name} before its transfer has ended")
        return self._host[block][name]

    def wait(self, block: int = 0) -> None:
        self._sent.synchronize()
        self._busy[block] = False
        if self._fetched[block]:
            self._fetched[block] = False
            self._make_up(self._host[block])

    def upload(self, size: int | None = None) -> None:
        events["upload"] += 1
        self._busy[0] = True

    def fetch(self, block: int = 0) -> None:
        events["fetch"] += 1
        self._busy[block] = self._fetched[block] = True

    def _make_up(self, host: dict[str, np.ndarray]) -> None:
        if "out_tokens" in host:
            host["steps"][:], host["done"][:] = host["max_tokens"], 1
            host["out_tokens"][:] = draw.integers(20, 200, host["out_tokens"].shape)
            host["out_logprobs"][:] = -1.0
        if "ranks" in host:
            columns = host["token_ids"].shape[-1]
            host["token_ids"][:] = draw.permutation(np.arange(20, 20 + columns))
            host["logprobs"][:] = -1.0
        elif "logprobs" in host:
            host["logprobs"][:] = -draw.exponential(size=host["logprobs"].shape)
        if "rewards" in host:
            host["rewards"][:] = draw.normal(size=host["rewards"].shape)


def capturing() -> bool:
    """Whether a capture is under way."""
    return _capturing


def mapped(count: int) -> tuple[torch.Tensor, np.ndarray]:
    """In place of pinned memory: what kernels are given is fake, and what the host reads says that no lane has ended.
    """
    with unset_fake_temporarily():
        flags = np.zeros(count, dtype=np.int32)
    return torch.empty(count, dtype=torch.int32), flags


def install() -> None:
    """Replaces what talks to a card, for the rest of the process."""
    fake_tensor.init_gpu_context = lambda *device: None
    cuda = torch.cuda
    cuda.is_available, cuda.current_device = lambda: True, lambda: 0
    cuda.get_device_name = lambda *device: os.environ.get("STARS_FAKE_GPU", "none")  # whose product table is meant
    cuda.get_device_capability, cuda.mem_get_info = lambda *device: (9, 0), lambda *device: (70 << 30, 80 << 30)
    cuda.get_device_properties = lambda *device: SimpleNamespace(multi_processor_count=132)
    cuda.is_current_stream_capturing = lambda: _capturing
    cuda.Event, cuda.CUDAGraph, cuda.Stream, cuda.graph_pool_handle = Event, Graph, Stream, object
    cuda.current_stream = lambda *device: Stream()
    cuda.stream, cuda.synchronize, cuda.empty_cache = (lambda stream: nullcontext()), _synchronize, lambda: None
    JITFunction.run = launch
    for module in ("cache", "draft", "edit_buffers", "logit_reads", "passes", "tiling"):
        __import__(f"stars.{module}", fromlist=["Buffers"]).Buffers = FakeBuffers
    pacing.mapped = mapped
    torch.Tensor.pin_memory = lambda self: self
    torch.frombuffer, torch.from_numpy = _faked(torch.frombuffer), _faked(torch.from_numpy)
    Checkpoint.read, AdaptedCheckpoint._own = _faked(Checkpoint.read), _faked(AdaptedCheckpoint._own)
    # Without a driver, torch's own indexing and copies of such tensors end in its CUDA code.
    FakeTensor.__getitem__, FakeTensor.copy_, FakeTensor.to = _getitem, _copy, _to
    FakeTensor.__setitem__ = lambda self, index, value: _getitem(self, index).copy_(value)


@contextmanager
def gpu():
    """Inside, tensors are fake."""
    with mode, Operations():
        yield


def _synchronize() -> None:
    events["synchronize"] += 1


def _faked(function):
    def made(*args, **kwargs):
        with unset_fake_temporarily():
            real = function(*args, **kwargs)
        return mode.from_tensor(real)

    return made


def _getitem(self: torch.Tensor, index) -> torch.Tensor:
    out, dim = self, 0
    for part in index if isinstance(index, tuple) else (index,):
        if part is None:
            out, dim = out.unsqueeze(dim), dim + 1
        elif isinstance(part, slice):
            start, stop, step = part.indices(out.shape[dim])
            out, dim = torch.ops.aten.slice.Tensor(out, dim, start, max(start, stop), step), dim + 1
        else:
            out = torch.ops.aten.select.int(out, dim, part)
    return out


def _copy(self: torch.Tensor, other: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    assert self.shape == torch.broadcast_shapes(self.shape, other.shape), (self.shape, other.shape)
    _note_transfer(self.device, other.device, non_blocking)
    return self


def _to(self: torch.Tensor, *args, copy: bool = False, non_blocking: bool = False, device=None, dtype=None):
    for value in args:
        if isinstance(value, torch.dtype):
            dtype = value
        else:
            device = value
    device = self.device if device is None else torch.device(device)
    if not copy and device.type == self.device.type and dtype in (None, self.dtype):
        return self
    _note_transfer(device, self.device, non_blocking)
    return torch.empty(self.shape, dtype=dtype or self.dtype, device=device)


def _note_transfer(to: torch.device, come_from: torch.device, non_blocking: bool) -> None:
    if to.type != come_from.type:
        events["transfer" if non_blocking else "blocking transfer"] += 1
        if _capturing:
            faults.append("a transfer during a capture")
