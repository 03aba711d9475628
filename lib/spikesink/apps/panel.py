"""A panel of controls for one cut of one prompt, with a picture that follows them: what notebook 11 is built around."""

import base64
import io
from collections.abc import Sequence
from html import escape

import ipywidgets
from transformer_lens.model_bridge import TransformerBridge

from spikesink import plots
from spikesink.chain.lifecycle import Lifecycle
from spikesink.model.anatomy import Anatomy, anatomy, block
from spikesink.patching.interventions import Intervention, mask_key, scale
from spikesink.patching.outcome import view
from spikesink.patching.sites import stream

MEAN = -1  # the choice of no single head


MOST_TOKENS = 64  # of a prompt that a panel takes: it is to answer in about a second


def parse_channels(text: str, about: Anatomy, spike: Sequence[int]) -> list[int]:
    """Channels out of what somebody typed: "spike" for the spike channels, "all", or numbers and ranges, "3, 10-12".

    Raises:
        ValueError: something that is neither, or a channel that does not exist.
    """
    found: list[int] = []
    for word in text.replace(",", " ").split():
        if word == "spike":
            found += spike
        elif word == "all":
            found += range(about.d_model)
        else:
            first, _, last = word.partition("-")
            if not first.isdecimal() or (last and not last.isdecimal()):
                raise ValueError(f'{word!r} names no channel; give numbers, ranges such as 3-7, "spike" or "all".')
            if (most := max(int(first), int(last or first))) >= about.d_model:
                raise ValueError(f"channel {most} does not exist; there are channels 0 to {about.d_model - 1}.")
            found += range(int(first), int(last or first) + 1)
    if not found:
        raise ValueError('no channel was given; give numbers, ranges such as 3-7, "spike" or "all".')
    return sorted(set(found))


class Panel(ipywidgets.VBox):
    """Controls and a picture that follows them: `panel` makes one. Where no widgets are shown, the picture stands."""

    def __init__(self, model: TransformerBridge, life: Lifecycle, prompt: str):
        about, cycle = anatomy(model), life.main
        self.model, self.about, self.spike = model, about, list(cycle.channels) if cycle else []
        point = (cycle.plateau[0] if cycle else about.n_blocks // 2) // 2 * 2
        half, whole = (ipywidgets.Layout(width=width, min_width="0") for width in ("48%", "97%"))
        later = {"continuous_update": False, "layout": half}
        self.prompt = ipywidgets.Text(value=prompt, description="prompt", **later | {"layout": whole})
        self.block = ipywidgets.SelectionSlider(
            options=range(0, about.n_blocks + 1, 2), value=point, description="after block", **later
        )
        self.channels = ipywidgets.Text(value="spike" if cycle else "all", description="channels", **later)
        self.factor = ipywidgets.FloatSlider(value=0.0, min=-1, max=4, step=0.25, description="factor", **later)
        self.position = ipywidgets.BoundedIntText(value=0, min=0, max=MOST_TOKENS - 1, description="position", **later)
        self.mask = ipywidgets.Checkbox(description="hide it from later layers' attention", layout=half)
        heads = [("mean of all", MEAN), *((str(h), h) for h in range(about.n_heads))]
        self.head = ipywidgets.Dropdown(options=heads, value=MEAN, description="head", layout=half)
        picture = ipywidgets.Layout(width="97%", max_width="1050px", object_fit="contain")
        self.said, self.picture, self.table = (
            ipywidgets.HTML(),
            ipywidgets.Image(format="png", layout=picture),
            ipywidgets.HTML(),
        )
        controls = (self.prompt, self.block, self.channels, self.factor, self.position, self.mask, self.head)
        for control in controls:
            control.observe(self.redraw, names="value")
        row = ipywidgets.Layout(width="100%", overflow="hidden")
        rows = [
            ipywidgets.HBox(pair, layout=row) for pair in ((self.block, self.factor), (self.channels, self.position))
        ]
        rows += [ipywidgets.HBox((self.head, self.mask), layout=row), self.said]
        super().__init__([self.prompt, *rows, self.picture, self.table], layout=ipywidgets.Layout(width="100%"))
        self.redraw()

    def interventions(self) -> list[Intervention]:
        """What the controls say.

        Raises:
            ValueError: channels that are none.
        """
        channels = parse_channels(self.channels.value, self.about, self.spike)
        at = self.position.value
        cuts = [
            scale(
                stream(block(self.block.value)),
                self.factor.value,
                at,
                None if len(channels) == self.about.d_model else channels,
            )
        ]
        layers = range(self.block.value // 2, self.about.n_layers)
        return cuts + ([mask_key(at, layers)] if self.mask.value and layers else [])

    def redraw(self, change: object = None) -> None:
        """Run the prompt anew and show it; what is wrong is said in the panel."""
        try:
            tokens = self.model.to_tokens(self.prompt.value)[0]
            if not 0 < len(tokens) <= MOST_TOKENS:
                raise ValueError(f"a prompt of {len(tokens)} tokens is not for this panel; give 1 to {MOST_TOKENS}.")
            seen = view(self.model, tokens, *self.interventions())
        except ValueError as error:
            self.said.value = f'<b style="color: #D55E00">{escape(str(error))}</b>'
            return
        buffer = io.BytesIO()
        plots.patched_view(seen, None if self.head.value == MEAN else self.head.value).savefig(
            buffer, format="png", dpi=90
        )
        self.picture.value = buffer.getvalue()
        self.said.value = f"<b>{escape(seen.what)}</b>"
        cells = "".join(
            f"<tr><td><code>{escape(repr(t))}</code></td><td>{c:.1%}</td><td>{p:.1%}</td></tr>" for t, c, p in seen.top
        )
        self.table.value = f"<table><tr><th>next token</th><th>clean</th><th>patched</th></tr>{cells}</table>"

    def _repr_mimebundle_(self, **options) -> dict[str, object]:
        bundle = super()._repr_mimebundle_(**options)
        picture = base64.b64encode(self.picture.value).decode()
        return bundle | {"image/png": picture, "text/plain": "a panel of controls"}


def panel(
    model: TransformerBridge, life: Lifecycle, prompt: str = "The old clock at the station ran backwards."
) -> Panel:
    """Controls for one cut of one prompt: where, which channels, by what factor; redrawn at each change.

    Args:
        model: as `load` returns it.
        life: as `find_lifecycle` returns it, for where the controls start.
        prompt: of at most 64 tokens.
    """
    return Panel(model, life, prompt)
