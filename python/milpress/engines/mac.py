"""Facts about this Mac, its state and a process on it."""

from __future__ import annotations

import ctypes
import os
import plistlib
import re
import subprocess
import sys
from typing import Any
from xml.parsers.expat import ExpatError

# Offsets in task_vm_info (mach/task_info.h), in 32-bit words: phys_footprint is at byte 144,
# the ledger's peak of it, since revision 3, at byte 168.
_TASK_VM_INFO = 22
_N_WORDS = 128
_FOOTPRINT_BYTE = 144
_PEAK_BYTE = 168
_THERMAL_STATES = ("nominal", "fair", "serious", "critical")


class Mac:
    """The Mac that this runs on. Whatever it can't tell is ``None``."""

    @property
    def is_here(self) -> bool:
        """Whether this is macOS at all."""
        return sys.platform == "darwin"

    def sysctl(self, name: str) -> str | None:
        """Return a value of the kernel."""
        return self._output("/usr/sbin/sysctl", "-n", name)

    def describe(self) -> dict[str, Any]:
        """Return model, chip and system, and what spoils figures."""
        hypervisor = self.sysctl("kern.hv_vmm_present")
        return {
            "model": self.sysctl("hw.model") or "unknown",
            "chip": self.sysctl("machdep.cpu.brand_string") or "unknown",
            "os": f"macOS {self._output('/usr/bin/sw_vers', '-productVersion') or 'unknown'}",
            "os_build": self._output("/usr/bin/sw_vers", "-buildVersion") or "unknown",
            "is_virtual": None if hypervisor is None else hypervisor == "1",
            "low_power": _flag(self._output("/usr/bin/pmset", "-g"), r"lowpowermode\s+(\d)"),
            "on_battery": self._on_battery(),
        }

    def footprint(self) -> tuple[int, int | None] | None:
        """Return the memory that this process takes (``phys_footprint``), and its peak."""
        library = ctypes.CDLL("/usr/lib/libSystem.B.dylib")
        words = (ctypes.c_uint32 * _N_WORDS)()
        count = ctypes.c_uint32(_N_WORDS)
        task = ctypes.c_uint32.in_dll(library, "mach_task_self_")
        if library.task_info(task, _TASK_VM_INFO, words, ctypes.byref(count)) != 0:
            return None
        raw = bytes(words)
        read = count.value * 4

        def at(offset: int) -> int | None:
            if offset + 8 > read:
                return None
            return int.from_bytes(raw[offset : offset + 8], sys.byteorder)

        footprint = at(_FOOTPRINT_BYTE)
        return None if footprint is None else (footprint, at(_PEAK_BYTE))

    def thermal_state(self) -> str | None:
        """Return ``NSProcessInfo.thermalState``, by the Objective-C runtime."""
        runtime = ctypes.CDLL("/usr/lib/libobjc.A.dylib")
        ctypes.CDLL("/System/Library/Frameworks/Foundation.framework/Foundation")
        runtime.objc_getClass.restype = ctypes.c_void_p
        runtime.objc_getClass.argtypes = [ctypes.c_char_p]
        runtime.sel_registerName.restype = ctypes.c_void_p
        runtime.sel_registerName.argtypes = [ctypes.c_char_p]
        send = ctypes.cast(
            runtime.objc_msgSend,
            ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
        )
        info = send(
            runtime.objc_getClass(b"NSProcessInfo"), runtime.sel_registerName(b"processInfo")
        )
        state = send(info, runtime.sel_registerName(b"thermalState")) or 0
        return _THERMAL_STATES[state] if state < len(_THERMAL_STATES) else f"state {state}"

    def start_power(self, seconds: float) -> subprocess.Popen[bytes]:
        """Start to sample power for so long; that takes root, or sudo without a password."""
        command = ["/usr/bin/powermetrics", "--samplers", "cpu_power,gpu_power,ane_power"]
        command += ["--format", "plist", "-n", "1", "-i", str(max(100, int(1000 * seconds)))]
        if os.geteuid() != 0:
            command = ["/usr/bin/sudo", "-n", *command]
        return subprocess.Popen(  # noqa: S603
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def power(self, sampling: subprocess.Popen[bytes]) -> dict[str, Any]:
        """Return what was sampled, in milliwatts; nothing if that was not allowed."""
        data, _ = sampling.communicate()
        return power_of(data) if sampling.returncode == 0 else {}

    def _on_battery(self) -> bool | None:
        text = self._output("/usr/bin/pmset", "-g", "batt")
        return None if text is None else "'Battery Power'" in text

    def _output(self, *command: str) -> str | None:
        try:
            process = subprocess.run(  # noqa: S603
                command, capture_output=True, text=True, timeout=30, check=False
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return process.stdout.strip() if process.returncode == 0 else None


def power_of(data: bytes) -> dict[str, Any]:
    """Return the power of each processor from what powermetrics prints, in milliwatts.

    Some versions print power, others the energy of the interval in millijoules.
    """
    # Samples are separated, and may be begun, by a zero byte.
    sample = next((part for part in data.split(b"\0") if part.strip()), b"")
    try:
        read = plistlib.loads(sample)
        processor, seconds = read.get("processor", {}), read.get("elapsed_ns", 0) / 1e9
    except (plistlib.InvalidFileException, ExpatError, ValueError, AttributeError, TypeError):
        return {}
    power = {}
    for name, key in (("cpu", "cpu"), ("gpu", "gpu"), ("ane", "neural_engine")):
        if f"{name}_power" in processor:
            power[f"{key}_mw"] = float(processor[f"{name}_power"])
        elif f"{name}_energy" in processor and seconds:
            power[f"{key}_mw"] = float(processor[f"{name}_energy"]) / seconds
    return power


def _flag(text: str | None, pattern: str) -> bool | None:
    match = re.search(pattern, text or "")
    return match.group(1) == "1" if match else None
