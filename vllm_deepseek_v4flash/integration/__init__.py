"""Everything that vLLM calls: registration, refusals, workarounds, the quantization config, the model class.

Only this folder registers or patches anything in vLLM.
"""
