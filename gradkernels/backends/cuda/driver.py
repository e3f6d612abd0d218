"""One GPU and the kernels on it, through `cuda.bindings` alone: load, ask what fits, launch on torch's current stream.

A launch is one driver call of a few microseconds: what can be prepared is, once per kernel and thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from gradkernels.cells.codegen import device_struct

from . import nvrtc
from .variant import Form

OLDEST = (8, 0)  # asynchronous copies, bf16 and tf32 products
PORTABLE_CLUSTER = 8  # blocks of a cluster on every GPU that has clusters; more must be allowed, and may not fit
EAGER = 12040  # drivers from 12.4 on load a function when told to


@functools.cache
def bindings() -> ModuleType:
    """cuda.bindings.driver over a driver that answers; RuntimeError with the reason and how to get it."""
    try:
        from cuda.bindings import driver
    except ImportError as e:
        raise RuntimeError(f"cuda-bindings cannot be imported ({e}); {nvrtc.INSTALL}") from e
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError as e:
        raise RuntimeError(f"there is no NVIDIA driver ({str(e).splitlines()[0]})") from e
    if int(status):
        raise RuntimeError(f"the NVIDIA driver does not start: {status.name}")
    return driver


def why_not(device: torch.device | None = None) -> str | None:
    """The reason why kernels cannot be compiled and run on that GPU (None: the current one), or None."""
    if device is not None and device.type != "cuda":
        return f"it runs on NVIDIA GPUs, not on {device}"
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    index = device.index if device is not None and device.index is not None else torch.cuda.current_device()
    return _why_not(index)


@functools.cache
def _why_not(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    return nvrtc.why_not() or refused(torch.cuda.get_device_name(index), capability) or _driver_why_not()


def refused(name: str, capability: tuple[int, int]) -> str | None:
    """Why kernels do not run on a GPU of that name and compute capability, or None."""
    major, minor = capability
    if capability < OLDEST:
        return f"{name} has compute capability {major}.{minor}; the kernels need {OLDEST[0]}.{OLDEST[1]}"
    if 10 * major + minor not in nvrtc.supported():
        found = ".".join(map(str, nvrtc.version()))
        return f"NVRTC {found} does not know {name}, sm_{major}{minor}; pip install --upgrade nvidia-cuda-nvrtc"
    return None


def _driver_why_not() -> str | None:
    try:
        bindings()
    except RuntimeError as e:
        return str(e)
    return None


def machine(device: torch.device) -> Machine:
    """The GPU of a torch device; the same object in every call.

    Raises:
        RuntimeError: kernels cannot be compiled and run there, with the reason and how to get it.
    """
    return _machine(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _machine(index: int) -> Machine:
    reason = why_not(torch.device("cuda", index))
    if reason is not None:
        raise RuntimeError(f"CUDA kernels cannot run on cuda:{index}: {reason}")
    return Machine(index, torch._C._cuda_getCurrentRawStream)


class Machine:
    """One GPU: its limits, and the kernels that were compiled for it."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int  # that one block may have
    max_cluster: int  # blocks of a cluster; whether a kernel gets so many, only its `resident` tells

    def __init__(self, index: int, stream: Callable[[int], int]):
        """index: as torch and the driver count; stream: the handle of the stream that work of that device goes to."""
        self._cuda = bindings()
        self._index, self._stream = index, stream
        self._device = check(self._cuda.cuDeviceGet(index))
        self._context = check(self._cuda.cuDevicePrimaryCtxRetain(self._device))  # torch's own
        self._handle = int(self._context)
        self._kernels: dict[Form, Kernel] = {}
        self._lock = threading.RLock()
        get = lambda what: check(self._cuda.cuDeviceGetAttribute(self._attribute(what), self._device))
        self.name = check(self._cuda.cuDeviceGetName(128, self._device)).partition(b"\0")[0].decode()
        self.capability = get("COMPUTE_CAPABILITY_MAJOR"), get("COMPUTE_CAPABILITY_MINOR")
        self.multiprocessors = get("MULTIPROCESSOR_COUNT")
        self.shared_bytes = get("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        clusters = self.capability >= (9, 0) and get("CLUSTER_LAUNCH")
        self.max_cluster = (
            1 if not clusters else 2 * PORTABLE_CLUSTER if self.capability[0] in (9, 10) else PORTABLE_CLUSTER
        )

    def _attribute(self, name: str) -> Any:
        return getattr(self._cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")

    def kernel(self, variant: Form) -> Kernel:
        """The variant, compiled (or found on disk), loaded, and ready to launch; the same object in every call.

        A stream may be capturing meanwhile: nothing of this becomes part of a graph.

        Raises:
            RuntimeError: it does not compile, or the GPU does not take it.
        """
        found = self._kernels.get(variant)
        if found is not None:
            return found
        with self._lock:
            if variant not in self._kernels:
                texts = {**nvrtc.headers(), "cells.cuh": device_struct(variant.cell)}
                compiled = nvrtc.compile(variant.source(), texts, nvrtc.architecture(self.capability))
                with self.setting_up():
                    self._kernels[variant] = Kernel(self, variant, compiled)
            return self._kernels[variant]

    @contextlib.contextmanager
    def setting_up(self) -> Iterator[None]:
        """With this GPU's context current in the thread, and with leave to load code while another call captures."""
        relaxed = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        check(self._cuda.cuCtxPushCurrent(self._context))
        try:
            mode = check(self._cuda.cuThreadExchangeStreamCaptureMode(relaxed))
            try:
                yield
            finally:
                check(self._cuda.cuThreadExchangeStreamCaptureMode(mode))
        finally:
            check(self._cuda.cuCtxPopCurrent())


class Kernel:
    """A variant on a GPU."""

    variant: Form
    spilled: int  # bytes that a thread writes to and reads from memory because registers did not suffice

    def __init__(self, machine: Machine, variant: Form, compiled: nvrtc.Compiled):
        """With the machine setting up."""
        self.variant, self.spilled = variant, compiled.spilled
        self._machine, self._cuda = machine, machine._cuda
        self._thread = threading.local()
        cuda, limits = self._cuda, self._cuda.CUfunction_attribute
        try:
            library = check(cuda.cuLibraryLoadData(compiled.cubin, [], [], 0, [], [], 0))  # for the life of the process
            self._function = check(cuda.cuKernelGetFunction(check(cuda.cuLibraryGetKernel(library, b"run"))))
            if check(cuda.cuDriverGetVersion()) >= EAGER:
                check(cuda.cuFuncLoad(self._function))  # not at the first launch, which may be under capture
            set_to = lambda limit, value: check(cuda.cuFuncSetAttribute(self._function, limit, value))
            set_to(limits.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, variant.shared_bytes)
            if variant.C > PORTABLE_CLUSTER:
                set_to(limits.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
        except RuntimeError as e:
            raise RuntimeError(f"{e}, loading {self._asked()}") from e

    @functools.cached_property
    def _resident(self) -> int:
        cuda, v = self._cuda, self.variant
        try:
            with self._machine.setting_up():
                if v.C > 1:
                    clusters = _Launch(cuda, v, False).config
                    return check(cuda.cuOccupancyMaxActiveClusters(self._function, clusters))
                blocks = cuda.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, v.threads, v.shared_bytes)
                return check(blocks) * self._machine.multiprocessors
        except RuntimeError as e:
            raise RuntimeError(f"{e}, counting what fits of {self._asked()}") from e

    def resident(self) -> int:
        """Clusters (blocks where C == 1) that run at the same time on an empty GPU, by the driver's own count.

        Raises:
            RuntimeError: not even one can ever run.
        """
        return self._resident

    def launch(self, blocks: int, arguments: ctypes.Structure) -> None:
        """Put so many blocks on torch's current stream of this GPU; the arguments are copied before this returns.

        Raises:
            RuntimeError: the launch was refused, or work before it has failed; with what it asked for.
        """
        cuda, machine, mine = self._cuda, self._machine, self._launch()
        config = mine.config
        stream = machine._stream(machine._index)
        if stream != mine.stream:
            config.hStream = mine.stream = stream
        config.gridDimX = blocks
        mine.pointers[0] = ctypes.addressof(arguments)
        _, current = cuda.cuCtxGetCurrent()
        elsewhere = int(current) != machine._handle  # a thread that torch has not used yet, or that is at another GPU
        if elsewhere:
            check(cuda.cuCtxPushCurrent(machine._context))
        (status,) = cuda.cuLaunchKernelEx(config, self._function, mine.address, 0)
        if elsewhere:
            check(cuda.cuCtxPopCurrent())
        if status:
            raise RuntimeError(f"{said(cuda, status)}, launching {blocks} blocks of {self._asked()} on {machine.name}")

    def _launch(self) -> _Launch:
        """What a thread launches with, its own because the driver reads it while other threads run."""
        try:
            return self._thread.launch
        except AttributeError:
            self._thread.launch = _Launch(self._cuda, self.variant, self.variant.cooperative)
            return self._thread.launch

    def _asked(self) -> str:
        v = self.variant
        cluster = f" in clusters of {v.C}" if v.C > 1 else ""
        cooperative = ", all resident at once" if v.cooperative else ""
        return f"{v.threads} threads and {v.shared_bytes} bytes of shared memory{cluster}{cooperative} ({v})"


class _Launch:
    """A launch configuration and the place that says where the kernel's one argument is."""

    def __init__(self, cuda: ModuleType, variant: Form, cooperative: bool):
        self.config = config = cuda.CUlaunchConfig()
        self.stream: int | None = None
        self.pointers = (ctypes.c_void_p * 1)()
        self.address = ctypes.addressof(self.pointers)
        config.gridDimX, config.gridDimY, config.gridDimZ = variant.C, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = variant.threads, 1, 1
        config.sharedMemBytes = variant.shared_bytes
        attributes = []
        if variant.C > 1:
            a = cuda.CUlaunchAttribute()
            a.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            a.value.clusterDim.x, a.value.clusterDim.y, a.value.clusterDim.z = variant.C, 1, 1
            attributes.append(a)
        if cooperative:
            a = cuda.CUlaunchAttribute()
            a.id, a.value.cooperative = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE, 1
            attributes.append(a)
        config.attrs, config.numAttrs = attributes, len(attributes)


def said(cuda: ModuleType, status: Any) -> str:
    _, text = cuda.cuGetErrorString(status)
    return f"{status.name} ({text.decode()})" if text else status.name


def check(result: tuple[Any, ...]) -> Any:
    """The values of a driver call; RuntimeError with the driver's words when it failed."""
    status, *values = result
    if status:
        raise RuntimeError(said(bindings(), status))
    return values[0] if len(values) == 1 else values
