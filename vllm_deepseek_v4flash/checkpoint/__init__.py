"""Reading DeepSeek-V4 checkpoints.

`names` has every tensor's name and shape, `headers` reads safetensors headers, `formats` the packed weights. `survey`
decides whether a checkpoint fits its config.json and plans its packed modules; `loader` fills the model.
"""
