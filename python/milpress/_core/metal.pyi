# The kernels have the signatures of their twins on the CPU.
from milpress._core import compact as compact
from milpress._core import keep_above as keep_above
from milpress._core import keep_largest as keep_largest
from milpress._core import keep_n_m as keep_n_m
from milpress._core import kmeans1d as kmeans1d
from milpress._core import lut_assign as lut_assign
from milpress._core import quantize as quantize
from milpress._core import quantize_mse as quantize_mse

class DeviceError(RuntimeError): ...

def device() -> tuple[str, str]: ...
def self_test() -> str: ...
