"""Break the chain: change an activation on its way, and see what becomes of the model.

    from spikesink import patching

    cut = patching.zero(patching.stream(after=patching.mlp(11)), positions=0, channels=507)
    print(patching.evaluate(model, tokens, cut))

`sites` name activations, `interventions` are small values that say what is changed, where; `patched` holds them while a
context lasts, during `generate` too; `recordings` gives what to put in; `outcome` measures what becomes of the model.
`cuts` breaks each link between spike and sink; `behaviour` asks what that does beyond perplexity.
"""

# ruff: noqa: F401 (the names that this package offers)
from spikesink.model.anatomy import attn, block, mlp
from spikesink.patching.cuts import decouple, unsink
from spikesink.patching.interventions import Intervention, add, apply, mask_key, patched, scale, set_to, skip, zero
from spikesink.patching.outcome import Outcome, View, compare, evaluate, next_tokens, sweep, table, view
from spikesink.patching.recordings import mean_of, means_of, patch_from, record
from spikesink.patching.sites import Site, attention, hook, key, query, read, readout, stream, value, write, z
