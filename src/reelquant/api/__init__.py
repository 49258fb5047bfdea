"""The verbs of the library. What they do belongs to the layers below."""

from reelquant.api.folders import configure, export, load, open_pipeline, push_to_hub, save, verify
from reelquant.api.measuring import benchmark, compare, evaluate, saturation
from reelquant.api.quantizing import folder_job, plan, plans, quantize, quantize_folder, read_conditions
from reelquant.api.removing import drop_blocks
from reelquant.api.tuning import tune

__all__ = [
    "benchmark",
    "compare",
    "configure",
    "drop_blocks",
    "evaluate",
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
    "tune",
    "verify",
]
