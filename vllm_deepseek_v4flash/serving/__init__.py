"""Serving people: the chat encoding of each generation of weights, its tokenizer modes, and the output parsers."""
