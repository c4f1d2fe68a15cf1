"""The machine: what it is, whether it is idle, and how much memory a process took."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("milpress", "numpy", "scikit-learn", "coremltools", "torch")
_FLAGS = ("avx2", "f16c", "fma", "avx512f", "asimd", "asimdhp", "sve")
_BUSY = 0.15  # cores that others may keep busy before a warning


def describe() -> dict[str, Any]:
    """Return what a reader must know about the machine to judge a time."""
    cpu = _text("/proc/cpuinfo")
    flags = set(re.findall(r"[\w]+", _field(cpu, r"(?:flags|Features)")))
    compiler = shutil.which("c++")
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return {
        "cpu": _field(cpu, "model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "l3_kb": int(re.sub(r"\D", "", _field(cpu, "cache size")) or 0),
        "ram_mb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6),
        "system": f"{platform.system()} {platform.release()}",
        "huge_pages": _chosen(_text("/sys/kernel/mm/transparent_hugepage/enabled")),
        "libc": " ".join(platform.libc_ver()),
        "compiler": _first_line([compiler, "--version"]) if compiler else "",
        "python": platform.python_version(),
        "versions": versions,
        "load_average": list(os.getloadavg()),
        "busy_cores": busy_cores(),
    }


def busy_cores(seconds: float = 1.0) -> float:
    """Return how many cores are busy while this process sleeps; NaN where it can't be told."""
    before = _busy_ticks()
    time.sleep(seconds)
    after = _busy_ticks()
    return (after - before) / os.sysconf("SC_CLK_TCK") / seconds


def _busy_ticks() -> float:
    first = _text("/proc/stat").partition("\n")[0].split()[1:]
    if not first:
        return float("nan")
    user, nice, system, _idle, _iowait, *rest = map(int, first)
    return user + nice + system + sum(rest[:3])


def idleness_warning(machine: dict[str, Any]) -> str:
    """Return a sentence if others use the machine, else nothing."""
    if not machine["busy_cores"] > _BUSY:
        return ""
    return (
        f"the machine is not idle: {machine['busy_cores']:.1f} cores were busy before the start, "
        f"load average {machine['load_average'][0]:.1f}; ratios suffer, wall times most"
    )


@contextmanager
def warm_memory() -> Iterator[None]:
    """Let freed memory be used again in this block instead of being given back to the system.

    A kernel's result would otherwise lie on fresh pages each time, whose zeroing costs as much as a
    kernel, while the target of a `memcpy` is warm. glibc only; elsewhere nothing changes.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        yield
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)
    try:
        yield
    finally:
        mallopt(m_mmap_max, 65_536)
        mallopt(m_trim_threshold, 128 * 1024)
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True, slots=True)
class Process:
    """What a process of its own took."""

    peak_mb: float
    cpu_seconds: float
    wall_seconds: float


_CHILD = """
import re, sys, time
from pathlib import Path
from milpress.cli import root
started = time.perf_counter()
try:
    code = root.run()
finally:
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\\s+(\\d+)", status)[1]
    print(peak, time.process_time(), time.perf_counter() - started, file=sys.stderr)
raise SystemExit(code)
"""


def run_milpress(arguments: Sequence[str]) -> Process:
    """Run the command line in a fresh process, and return what it took, imports included."""
    # VmHWM begins anew with the program; a child's ru_maxrss would hold its parent's.
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        msg = f"milpress {' '.join(arguments)} must succeed, got\n{done.stderr}"
        raise RuntimeError(msg)
    peak, cpu, wall = map(float, done.stderr.split()[-3:])
    return Process(peak_mb=peak * 1024 / 1e6, cpu_seconds=cpu, wall_seconds=wall)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _chosen(text: str) -> str:
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else ""


def _first_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0]
