"""reelquant: video diffusion pipelines in few bits, with proof that the videos are still good.

import reelquant
pipe = reelquant.open_pipeline("tiny-dit")
report = reelquant.quantize(pipe, "qvd-w8a8")
reelquant.save(pipe, "out", report)          # a stock diffusers folder; opens again after `import reelquant`
reelquant.evaluate("out", "tiny-dit")        # what it cost, beside the noise floor
reelquant.benchmark("out", "tiny-dit")       # what it gained, on this machine
reelquant.tune("out", "fast")                # blocks that need not be computed at every step: as fast as the gate lets it be
"""

from reelquant._errors import (
    CalibrationError,
    CheckpointError,
    MeasurementError,
    RanksError,
    RecipeError,
    ReelQuantError,
    SiteError,
    UnsupportedError,
)
from reelquant._version import __version__
from reelquant.api import (
    benchmark,
    compare,
    configure,
    evaluate,
    evaluate_several,
    export,
    load,
    open_pipeline,
    plan,
    push_to_hub,
    quantize,
    quantize_folder,
    read_conditions,
    saturation,
    save,
    tune,
    verify,
)
from reelquant.integrations.config import ReelQuantConfig
from reelquant.integrations.own_module import load_denoiser
from reelquant.integrations.register import install as _install
from reelquant.models.denoiser import Denoiser

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "Denoiser",
    "MeasurementError",
    "RanksError",
    "RecipeError",
    "ReelQuantConfig",
    "ReelQuantError",
    "SiteError",
    "UnsupportedError",
    "__version__",
    "benchmark",
    "compare",
    "configure",
    "evaluate",
    "evaluate_several",
    "export",
    "load",
    "load_denoiser",
    "open_pipeline",
    "plan",
    "push_to_hub",
    "quantize",
    "quantize_folder",
    "read_conditions",
    "saturation",
    "save",
    "tune",
    "verify",
]

_install()  # diffusers learns to open quantized folders the moment it is imported, and not before
