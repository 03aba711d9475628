"""How massive activations (spikes) become attention sinks, measured on real language models.

What is the same everywhere is said here once:

- `model` is a TransformerBridge as `load` returns it. It knows its `anatomy` (sizes, norms, hooks) and its `source`.
- `weights` are a model's, as `weights_of` returns them, or as `open_weights` reads them without holding the model.
- `tokens` are windows [n, length] of token ids, as `windows` returns them.
- `life` is what `find_lifecycle` makes of `trace_windows`: which blocks write the spike, which cancel it, in which
  channels and on which tokens. It belongs to the windows it was found in.
- `seed` is that of whatever is drawn at random: controls, ordinary tokens, ordinary channels.
- Arguments come in this order: (model, tokens, life, what was measured before, options).
- A layer is counted from 0, a block (one write to the stream: attention, FFN, attention, ...) from 1, as the paper
  does; a `Block` prints both: "L11 MLP (block 24)". Point b of the stream is after block b, point 0 is the embedding.
- h~ is the normalised stream before the norm's learned scale, of norm sqrt(d_model).
- A measure is a function to a frozen dataclass. Where a model has no such part, or nothing spikes in it, the measure
  gives NotApplicable with the reason in its place, and so does every measure that is handed one.
- Bad arguments raise ValueError (LoadError for models, TextError for texts), numbers that are not finite
  FloatingPointError; each says in one sentence what is wrong and what would do.
- Tensors are float32 on the CPU unless said otherwise; eigenproblems are solved in float64.
"""

import lazy_loader

# What `import spikesink` offers is listed in __init__.pyi and imported when first asked for: torch and what stands
# on it take seconds, which a command that says "up to date" or what is wrong with its arguments need not wait for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
