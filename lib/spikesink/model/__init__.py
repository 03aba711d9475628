"""What a model is: loading it, its family, its weights and the texts it reads; the only place that knows families.

To add a family that TransformerLens supports, nothing is needed but a look at `anatomy`: it reads all that differs.
"""
