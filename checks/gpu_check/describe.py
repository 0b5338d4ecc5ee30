"""The device, driver, clocks and versions that the check runs on."""

from __future__ import annotations

import sys

from benchmarks.report import describe

from .results import Recorder


def run(recorder: Recorder) -> None:
    import torch

    device = torch.device("cpu" if recorder.dry or not torch.cuda.is_available() else "cuda")
    found = describe(device)
    if device.type == "cpu" and not recorder.dry:
        found["device"] = f"none: torch {torch.__version__} sees no CUDA device"
    found["python"] = sys.version.split()[0]
    recorder.result.data |= {"device": found, "usable": recorder.dry or device.type == "cuda"}
    recorder.attempt("describe", lambda: found["device"])
