"""What tests, checks and benchmarks share: engines, tiny checkpoints, oracles, the interpreter, traps."""
