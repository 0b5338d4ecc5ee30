"""One part, in its own process: `python -m checks.gpu_check.run_part NAME --result FILE --seconds S [--dry-run]`.

The part `describe` only describes the device, so that the process that starts the parts never opens it.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from .results import NotRunError, Recorder

MODULES = {"tests": "pytest_part"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    recorder = Recorder(options.name, options.result, options.seconds, options.dry_run)
    module = importlib.import_module(f".{MODULES.get(options.name, options.name)}", __package__)
    try:
        module.run(recorder)
    except NotRunError as error:
        recorder.skip(options.name, str(error))
    recorder.finish()


if __name__ == "__main__":
    main()
