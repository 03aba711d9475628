"""What serving does to a model, and which of it is the spike's doing and which the sink's.

`cells` are the model as it is, without the spike, without the sink, and without either; `quantize` rounds activations,
weights, keys and values in each of them.
"""
