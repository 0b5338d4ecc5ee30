from __future__ import annotations

from ..rope_table import rope_table as op

# A step computes it once for each kind of layer: a kernel would save nothing.
rope_table = op.reference
