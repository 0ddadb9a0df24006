"""What everseg runs on: versions, processors, devices and extras, for bug reports and `everseg --version`."""

from __future__ import annotations

import importlib
import locale
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import everseg
from everseg.display import Piece, Result, table

_FOR_DEVELOPERS = ("dev", "docs")
_EXTRA = re.compile(r"([\w.-]+)[^;]*;.*\bextra\s*==\s*['\"]([\w.-]+)['\"]")
"""One requirement of an extra, as an installed package names it: `timm>=1.0; extra == "timm"`."""
_VARIABLES = re.compile(
    "EVERSEG_.*|OMP_.*|MKL_.*|KMP_.*|CUDA_.*|NVIDIA_TF32_OVERRIDE|PYTORCH_.*|TORCH_.*|CUBLAS_WORKSPACE_CONFIG"
    "|(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|SLURM_(PROCID|NTASKS|JOB_NUM_NODES)|RAY_ADDRESS|ACCELERATE_.*|PYTHONPATH"
)
"""Variables that change what everseg does."""
_HARMLESS = re.compile(r"[\w.,:+-]*")
"""Values that are shown: numbers and words. Paths and all else may name a user or a machine."""


@dataclass(frozen=True, repr=False)
class Installation(Result):
    """Versions, processors, devices and extras of this installation."""

    everseg: str
    python: str
    system: str
    processor: str
    cores: int
    memory_gb: float | None
    threads: int | None
    """CPU threads that PyTorch uses; None where it cannot be imported."""
    device: str
    """Where models are trained: the GPU's name, or cpu; else why PyTorch cannot be imported."""
    gpus: tuple[str, ...]
    """Name and memory of each."""
    packages: dict[str, str]
    """Package that everseg needs -> its version, or "not installed"."""
    extras: dict[str, dict[str, str]]
    """Extra -> its packages -> the version of each, or "not installed"."""
    variables: dict[str, str]
    """Variables that change what everseg does; "set" where the value may name a user or a machine."""
    encoding: str
    """Of stdout, and of file names."""

    @property
    def installed(self) -> tuple[str, ...]:
        """Extras of which every package is installed."""
        return tuple(name for name, needs in self.extras.items() if _ABSENT not in needs.values())

    def summary(self) -> str:
        """Say in a few lines what `everseg --version` prints."""
        absent = [name for name in self.extras if name not in self.installed]
        lines = [
            f"everseg {self.everseg}",
            f"Python {self.python}, PyTorch {self.packages.get('torch', _ABSENT)}, device {self.device}",
            f"extras: {', '.join(self.installed) or 'none'}",
        ]
        return "\n".join([*lines, *([f"not installed: {', '.join(absent)}"] if absent else [])])

    def shown(self) -> Iterator[Piece]:
        rows = [
            ("everseg", self.everseg),
            ("Python", self.python),
            ("system", self.system),
            ("processor", f"{self.processor}, {self.cores} cores"),
            ("memory", "unknown" if self.memory_gb is None else f"{self.memory_gb:g} GB"),
            ("CPU threads", "unknown" if self.threads is None else self.threads),
            ("device", self.device),
            *(("GPU", text) for text in self.gpus),
            *((name, version) for name, version in self.packages.items()),
            *(
                (f"extra {name}", ", ".join(f"{package} {version}" for package, version in needs.items()))
                for name, needs in self.extras.items()
            ),
            *self.variables.items(),
            ("encoding", self.encoding),
        ]
        yield table(["what", "here"], rows)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_ABSENT = "not installed"


def env() -> Installation:
    """Describe this installation for a bug report: no name of a user, a machine or a folder is in it."""
    try:
        requirements = metadata.requires("everseg") or []
    except metadata.PackageNotFoundError:  # a checkout on the path that nobody installed
        requirements = []
    core, extras = [], dict[str, dict[str, str]]()
    for text in requirements:
        if found := _EXTRA.match(text):
            package, extra = found.groups()
            if extra not in _FOR_DEVELOPERS:
                extras.setdefault(extra, {})[package] = _version(package)
        elif "extra" not in text:
            core.append(re.split(r"[^\w.-]", text, maxsplit=1)[0])
    threads, device, gpus = _torch()
    return Installation(
        everseg=everseg.__version__,
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=_processor(),
        cores=os.cpu_count() or 1,
        memory_gb=_memory(),
        threads=threads,
        device=device,
        gpus=gpus,
        packages={name: _version(name) for name in core or ("torch", "numpy")},
        extras=extras,
        variables={
            name: value if _HARMLESS.fullmatch(value) else "set"
            for name, value in sorted(os.environ.items())
            if _VARIABLES.fullmatch(name)
        },
        encoding=f"stdout {sys.stdout.encoding}, files {sys.getfilesystemencoding()}, {locale.getpreferredencoding()}",
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _ABSENT


def _torch() -> tuple[int | None, str, tuple[str, ...]]:
    """CPU threads, the device and all GPUs; a PyTorch that cannot be imported is often what the report is about."""
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        told = re.sub(r"/\S*/", "", str(error))  # folders may name a user
        return None, f"unknown: PyTorch cannot be imported ({type(error).__name__}: {told})", ()
    gpus: tuple[str, ...] = ()
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        gpus = tuple(f"{one.name}, {one.total_memory / 2**30:.0f} GB" for one in properties)
        return torch.get_num_threads(), f"cuda (CUDA {torch.version.cuda})", gpus
    built = torch.version.cuda or torch.version.hip
    return (
        torch.get_num_threads(),
        f"cpu (PyTorch was built {f'for CUDA {built}' if built else 'for CPUs'})",
        (),
    )


def _processor() -> str:
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        told = ""
    found = re.search(r"^model name\s*:\s*(.+)$", told, re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (OSError, ValueError):
        return None
