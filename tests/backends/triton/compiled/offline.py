"""A GPU that is not there: Triton compiles for it, and launches are written down instead of made.

The whole host path runs with it, so what is compiled is what ships, for the arguments that it ships with. Tensors of this GPU
are ones of the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 166912, 90: 232448, 100: 232448, "gfx942": 65536, "gfx1100": 65536}  # bytes that a block can have


@dataclass
class Launch:
    name: str
    grid: tuple[int, int, int]
    arguments: tuple


@dataclass
class Kernel:
    name: str
    binary: bytes
    shared: int  # bytes

    @functools.cached_property
    def resources(self) -> tuple[int, int]:
        """Registers of a thread, and bytes of its memory that hold what did not fit into them."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.binary)
            file.flush()
            command = [str(BINARIES / "cuobjdump"), "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
        assert found, text
        return int(found[1]), max(int(found[2]), int(found[3]))


@dataclass
class Driver:
    """What Triton asks of a driver."""

    architecture: int | str  # compute capability of a GPU of NVIDIA's, name of one of AMD's
    launches: list[Launch] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)  # in the order in which they were loaded
    ptx: list[str] = field(default_factory=list)

    def __post_init__(self):
        properties = {"max_shared_mem": SHARED[self.architecture], "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=self.load_binary,
            unload_module=lambda module: None,
        )

    def get_current_target(self):
        if isinstance(self.architecture, int):
            return GPUTarget("cuda", self.architecture, 32)
        return GPUTarget("hip", self.architecture, 64 if self.architecture.startswith("gfx9") else 32)

    def get_current_device(self):
        return self.architecture  # Triton keeps what it has compiled by device

    def get_current_stream(self, device):
        return 0

    def load_binary(self, name, binary, shared, device):
        self.kernels.append(Kernel(name, binary, shared))
        return object(), object(), 0, 0, 1024

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            self.launches.append(Launch(metadata.name, (x, y, z), arguments))

        return launch

    def listen(self, src, metadata, metadata_group, times, cache_hit):
        self.ptx += [Path(p).read_text() for name, p in metadata_group.items() if name.endswith(".ptx")]


@contextlib.contextmanager
def gpu(architecture: int | str):
    """Within, a GPU of this architecture is Triton's."""
    config, driver, compilation = triton.runtime.driver, Driver(architecture), triton.knobs.compilation
    before = config._active, compilation.listener
    config._active, compilation.listener = driver, driver.listen
    try:
        yield driver
    finally:
        config._active, compilation.listener = before
