"""How massive activations (spikes) become attention sinks, measured on real language models."""

import lazy_loader

# What `import spikesink` offers is listed in __init__.pyi and imported when first asked for: torch and what stands
# on it take seconds, which a command that says "up to date" or what is wrong with its arguments need not wait for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
