"""What tests, checks and benchmarks share.

engine, server, client: `vllm.LLM` and `vllm serve` for small models, and requests with known answers.
tiny: small random checkpoints. oracle: transformers' model of them. parity: both side by side.
fake_model: the parameters that a checkpoint is loaded into. fixtures: checkpoints of the public tools, in `data/`.
integration, logs: vLLM's configuration without weights, vLLM in a fresh process, what a logger says.
format_cases, native_checkpoints, flash: checkpoints in every format, of every size.
ops/: oracles of the ops, error bounds, paged caches. interpreter: Triton's, corrected. ptxrun/: kernels as compiled.
mutate, traps: mistakes put into the running model. poison: memory that is allocated but not written.
scheduler/: requests run step by step. serving/: DeepSeek's tokenizer, chat messages, replies through the parsers.
v2_on_cpu/: vLLM's V2 model runner and CUDA graphs without a GPU.
"""
