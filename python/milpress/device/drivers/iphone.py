"""Driver for Core ML on an iPhone or iPad that is connected by cable.

coremltools builds an app, puts it on the device and talks to it by copying files, which takes
seconds and is not part of the times: the app takes those itself. Pitfalls that are handled here:

- A second load of the same model and units is answered with 0 ns, as it was none.
- States can't be used.
- coremltools looks for ``devicectl`` in the path; Xcode has it elsewhere.
- A compute plan is computed on the device, from the structure that this Mac reads.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import weakref
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from milpress.device.drivers import Driver, ms_of
from milpress.device.drivers.coreml import placed
from milpress.engines.calls import check_is_mac, plain
from milpress.engines.mac import Mac
from milpress.errors import DriverError
from milpress.mil.package import Package, description_of
from milpress.plain.arrays import Arrays


class RemoteCoreML:
    """The calls of coremltools that reach a device at the cable."""

    is_real = True

    @property
    def version(self) -> str:
        """Of coremltools."""
        import coremltools as ct

        return str(ct.__version__)

    def connected(self) -> list[Any]:
        """Return the iPhones and iPads that are there."""
        from coremltools.models.ml_program.experimental.remote_device import Device, DeviceType

        return [
            device
            for kind in (DeviceType.IPHONE, DeviceType.IPAD)
            for device in Device.get_connected_devices(kind)
        ]

    async def prepare(self, device: Any, team: str, bundle: str | None, folder: Path) -> Any:
        """Build, install and start the app."""
        from coremltools.models.ml_program.experimental.remote_device import AppSigningCredentials

        credentials = AppSigningCredentials(development_team=team, bundle_identifier=bundle)
        return await device.prepare_for_model_debugging(
            credentials=credentials, working_directory=folder
        )

    def model(
        self, package: str, weights: str, units: str, function: str | None, device: Any
    ) -> Any:
        """Return the model, not yet loaded."""
        import coremltools as ct
        from coremltools.models.ml_program.experimental.async_wrapper import MLModelAsyncWrapper

        return MLModelAsyncWrapper.from_spec_or_path(
            package,
            weights_dir=weights,
            compute_units=ct.ComputeUnit[units],
            function_name=function,
            device=device,
        )


class IPhoneDriver(Driver):
    """Measures an ``.mlpackage`` on the device at the cable.

    Parameters
    ----------
    team
        The development team that signs the app.
    bundle
        What the app is called, if the team's profile wants a name.
    function
        Which function of a package with several.
    device_name
        Which device, if there are several.
    core_ml, mac
        The framework and the machine; tests put others in their place, and all numbers are fake.

    Raises
    ------
    DriverError
        If this is no Mac, or there is no such device.
    """

    def __init__(
        self,
        team: str = "",
        bundle: str | None = None,
        function: str | None = None,
        device_name: str | None = None,
        *,
        core_ml: RemoteCoreML | None = None,
        mac: Mac | None = None,
    ) -> None:
        super().__init__()
        check_is_mac(mac or Mac())
        self._core_ml = core_ml or RemoteCoreML()
        self._team, self._bundle, self._function = team, bundle, function
        _find_devicectl()
        self._device = self._chosen(device_name)
        # One for all calls, as the app's connection lives on it.
        self._loop = asyncio.new_event_loop()
        weakref.finalize(self, self._loop.close)
        self._prepared: Any = None
        self._model: Any = None

    def describe(self) -> dict[str, Any]:
        """Return the device, and that what follows is measured."""
        return {
            "kind": "measured" if self._core_ml.is_real else "fake",
            "device": {
                "model": str(self._device.name),
                "chip": "unknown",
                "os": f"iOS {self._device.os_version}",
                "os_build": str(self._device.os_build_number),
                # Every device that coremltools can reach has one; it does not say how many cores.
                "compute_devices": ["cpu", "gpu", "neural_engine"],
            },
            "tool": {"coremltools": self._core_ml.version},
        }

    def compile(self, package: str, units: str, folder: str) -> dict[str, Any]:
        """Set up the app; coremltools compiles the package itself when it loads it."""
        del units, folder
        if description_of(Package(package).model, self._function).state:
            msg = "a model with states can't be measured on a device connected by cable"
            raise DriverError(msg)
        if self._prepared is None:
            # Kept, so that the app is built once and not for each configuration.
            home = Path.home() / "Library" / "Caches" / "milpress" / "modelrunner"
            home.mkdir(parents=True, exist_ok=True)
            self._prepared = self._wait(
                self._core_ml.prepare(self._device, self._team, self._bundle, home)
            )
        return {"ms": None, "path": package}

    def load(self, path: str, units: str) -> dict[str, Any]:
        """Load on the device, and return its own time of it."""
        if self._prepared is None:
            # Another process has the app; a second one would end it.
            return {"ms": None}
        weights = str(Path(path) / "Data" / "com.apple.CoreML" / "weights")
        self._model = self._core_ml.model(path, weights, units, self._function, self._prepared)
        self._wait(self._model.load())
        return {"ms": ms_of(self._model.load_duration_in_nano_seconds or None)}

    def output(self, sample: Arrays) -> Any:
        """Predict one sample; a call has the copying of files in it."""
        features = {name: plain(array) for name, array in sample.items()}
        return self._wait(self._model.predict(features))

    def _duration(self) -> float | None:
        return ms_of(self._model.last_predict_duration_in_nano_seconds)

    def placement(self) -> dict[str, Any]:
        """Return the device's plan, op by op."""
        plan = self._wait(self._model.retrieve_compute_plan())
        return {"source": "MLComputePlan", "ops": placed(plan, self._function)}

    def _chosen(self, name: str | None) -> Any:
        devices = self._core_ml.connected()
        if name is not None:
            devices = [device for device in devices if device.name == name]
        if len(devices) != 1:
            names = ", ".join(str(device.name) for device in devices) or "none"
            msg = f"one iPhone or iPad must be connected (or be named), got {names}"
            raise DriverError(msg)
        return devices[0]

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(work)


def _find_devicectl() -> None:
    if shutil.which("devicectl") or not shutil.which("xcrun"):
        return
    answer = subprocess.run(
        ["xcrun", "--find", "devicectl"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode == 0:
        folder = Path(answer.stdout.strip()).parent
        os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{folder}"
