"""What serving does to a model, and whether the spike or the sink is the cause.

`cells` are the model unchanged, with its sink held, and without its spike, its sink or both. `quantize` rounds
activations, weights, keys and values in each of them; `cache` lets a KV cache forget; `diagnosis` compares the costs.
`context` runs one long text.
"""
