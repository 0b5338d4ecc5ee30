"""Chat: the encoding of each generation of weights, reasoning modes, tokenizers, output parsers, middlewares."""
