"""The causal chain from spike to sink: each link measured on a model, from (model, tokens, life) to a dataclass."""
