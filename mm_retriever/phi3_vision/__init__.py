"""Phi-3 Vision: model, processor, constrained decoding, and LlamaIndex's LLM over it."""
