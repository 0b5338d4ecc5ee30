"""Everything that only a GPU shows, in one command and one report.

    python -m checks.gpu_check [--only PART ...] [--budget SECONDS] [--out DIR] [--commit TEXT] [--dry-run]

docs/gpu-check.md says what each part shows and how to read the report.
"""
