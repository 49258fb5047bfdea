"""The verbs of the library. What they do belongs to the layers below."""

from reelquant.api.folders import configure, export, load, open_pipeline, push_to_hub, save, verify
from reelquant.api.measuring import benchmark, compare, evaluate, evaluate_several, saturation
from reelquant.api.planning import plan
from reelquant.api.quantizing import folder_job, plans, quantize, quantize_folder, read_conditions
from reelquant.api.removing import drop_blocks
from reelquant.api.sensing import sensitivity
from reelquant.api.tuning import tune

__all__ = [
    "benchmark",
    "compare",
    "configure",
    "drop_blocks",
    "evaluate",
    "evaluate_several",
    "export",
    "folder_job",
    "load",
    "open_pipeline",
    "plan",
    "plans",
    "push_to_hub",
    "quantize",
    "quantize_folder",
    "read_conditions",
    "saturation",
    "save",
    "sensitivity",
    "tune",
    "verify",
]
