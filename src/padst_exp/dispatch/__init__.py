"""Which kernel computes each sparse layer: measured once on each machine, remembered."""

from padst_exp.dispatch.agreement import agrees, difference
from padst_exp.dispatch.backends import (
    Choice,
    choose,
    forced,
    require_device,
    restore,
    reuse,
    save,
    use_usual,
)
from padst_exp.dispatch.decision import Decision, device_name, fastest, is_recording, measure
from padst_kernels import Backend

__all__ = [
    "Backend",
    "Choice",
    "Decision",
    "agrees",
    "choose",
    "device_name",
    "difference",
    "fastest",
    "forced",
    "is_recording",
    "measure",
    "require_device",
    "restore",
    "reuse",
    "save",
    "use_usual",
]
