"""Which kernel computes each sparse layer: measured once on each machine, remembered.

A kernel is right when it agrees with plain PyTorch through a dense weight, forward and in every
gradient. What does not is not chosen, whichever backend it is and however fast.
"""

from padst_exp.dispatch.agreement import agrees, difference, fastest_right
from padst_exp.dispatch.backends import Pick, choose, forced, require_device, restore, reuse, save
from padst_exp.dispatch.inputs import Input, inputs_of
from padst_exp.dispatch.timing import device_name, is_recording, timings
from padst_kernels import Backend

__all__ = [
    "Backend",
    "Input",
    "Pick",
    "agrees",
    "choose",
    "device_name",
    "difference",
    "fastest_right",
    "forced",
    "inputs_of",
    "is_recording",
    "require_device",
    "restore",
    "reuse",
    "save",
    "timings",
]
