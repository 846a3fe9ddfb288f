"""Formats: how a frozen weight is kept in fewer bits, as codes and scales. Plain torch, which kernels are held to."""

from .fp8 import FP8
from .int8 import INT8
from .known import NAMED, dequantise, format_of
from .merging import Arrived
from .nf4 import NF4
from .stored import Format, Stored

__all__ = ["FP8", "INT8", "NAMED", "NF4", "Arrived", "Format", "Stored", "dequantise", "format_of"]
