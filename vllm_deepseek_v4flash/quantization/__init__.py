"""Quantised weights: the canonical form (`scheme`) and the formats that are read into it (`formats`)."""
