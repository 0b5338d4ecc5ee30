"""Checks everything that only a GPU shows, with one command and one report.

    python -m checks.gpu_check [--only PART ...] [--budget SECONDS] [--out DIR] [--commit TEXT] [--dry-run]

docs/gpu-check.md describes the parts and the report.
"""
