"""A PTX interpreter in numpy: runs PTX of nvcc or Triton without a GPU, counts its traffic, finds its races. See README.md."""

from .counters import Counters
from .device import Device
from .memory import DeviceArray
from .parser import Module, demangle, load, loads
from .syntax import Fault

__all__ = ["Counters", "Device", "DeviceArray", "Fault", "Module", "demangle", "load", "loads"]
