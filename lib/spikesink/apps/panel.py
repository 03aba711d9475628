"""A panel of controls for one cut of one prompt, with a picture that follows them: what notebook 11 is built around."""

import base64
import io
from collections.abc import Sequence
from html import escape

import ipywidgets
from ipywidgets import Layout

from spikesink import plots
from spikesink.chain.lifecycle import Lifecycle
from spikesink.model.anatomy import Block, Model
from spikesink.patching.interventions import Intervention, mask_key, scale
from spikesink.patching.outcome import view
from spikesink.patching.sites import stream

MEAN = -1  # the choice of no single head
MOST_TOKENS = 64  # of a prompt that a panel takes: it is to answer in about a second


def parse_channels(text: str, d_model: int, spike: Sequence[int]) -> list[int]:
    """Channels out of what somebody typed: "spike" for the spike channels, "all", or numbers and ranges, "3, 10-12"."""
    channels: set[int] = set()
    named = {"spike": spike, "all": range(d_model)}
    for word in text.replace(",", " ").split():
        first, _, last = word.partition("-")
        if word not in named and (not first.isdecimal() or (last and not last.isdecimal())):
            raise ValueError(f'{word!r} names no channel; give numbers, ranges such as 3-7, "spike" or "all".')
        if word not in named and (most := max(int(first), int(last or first))) >= d_model:
            raise ValueError(f"channel {most} does not exist; there are channels 0 to {d_model - 1}.")
        channels.update(named[word] if word in named else range(int(first), int(last or first) + 1))
    if not channels:
        raise ValueError('no channel was given; give numbers, ranges such as 3-7, "spike" or "all".')
    return sorted(channels)


class Panel(ipywidgets.VBox):
    """Controls and a picture that follows them: `panel` makes one. Where no widgets are shown, the picture stands."""

    def __init__(self, model: Model, life: Lifecycle, prompt: str):
        anatomy, cycle = model.anatomy, life.main
        self.model, self.spike = model, cycle.channels if cycle else ()
        blocks = [Block(b) for b in range(0, anatomy.n_blocks + 1, 2)]
        start = blocks[(cycle.plateau[0] if cycle else anatomy.n_blocks // 2) // 2]
        half, wide = Layout(width="48%", min_width="0"), Layout(width="97%", min_width="0")
        later = {"continuous_update": False, "layout": half}
        self.prompt = ipywidgets.Text(prompt, description="prompt", continuous_update=False, layout=wide)
        self.block = ipywidgets.SelectionSlider(options=blocks, value=start, description="after", **later)
        self.factor = ipywidgets.FloatSlider(0.0, min=-1, max=4, step=0.25, description="factor", **later)
        self.channels = ipywidgets.Text("spike" if cycle else "all", description="channels", **later)
        self.position = ipywidgets.BoundedIntText(0, min=0, max=MOST_TOKENS - 1, description="position", **later)
        heads = [("mean of all", MEAN), *((str(h), h) for h in range(anatomy.n_heads))]
        self.head = ipywidgets.Dropdown(options=heads, value=MEAN, description="head", layout=half)
        self.mask = ipywidgets.Checkbox(description="hide it from later layers' attention", layout=half)
        self.said, self.table = ipywidgets.HTML(), ipywidgets.HTML()
        picture = Layout(width="97%", max_width="1050px", object_fit="contain")
        self.picture = ipywidgets.Image(format="png", layout=picture)
        pairs = ((self.block, self.factor), (self.channels, self.position), (self.head, self.mask))
        for control in (self.prompt, *(control for pair in pairs for control in pair)):
            control.observe(self.redraw, names="value")
        rows = [ipywidgets.HBox(pair, layout=Layout(width="100%", overflow="hidden")) for pair in pairs]
        super().__init__([self.prompt, *rows, self.said, self.picture, self.table], layout=Layout(width="100%"))
        self.redraw()

    def interventions(self) -> list[Intervention]:
        """What the controls say."""
        n_layers, d_model = self.model.anatomy.n_layers, self.model.anatomy.d_model
        channels = parse_channels(self.channels.value, d_model, self.spike)
        some = None if len(channels) == d_model else channels
        cut = scale(stream(self.block.value), self.factor.value, self.position.value, some)
        layers = range(self.block.value // 2, n_layers)
        return [cut, *([mask_key(self.position.value, layers)] if self.mask.value and layers else [])]

    def redraw(self, change: object = None) -> None:
        """Run the prompt anew and show it; what is wrong is said in the panel."""
        try:
            tokens = self.model.to_tokens(self.prompt.value)[0]
            if not 0 < len(tokens) <= MOST_TOKENS:
                raise ValueError(f"a prompt of {len(tokens)} tokens is not for this panel; give 1 to {MOST_TOKENS}.")
            viewed = view(self.model, tokens, *self.interventions())
        except ValueError as error:
            self.said.value = f'<b style="color: #D55E00">{escape(str(error))}</b>'
            return
        png, head = io.BytesIO(), None if self.head.value == MEAN else self.head.value
        plots.patched_view(viewed, head).savefig(png, format="png", dpi=90)
        self.picture.value = png.getvalue()
        self.said.value = f"<b>{escape(viewed.what)}</b>"
        cells = "".join(
            f"<tr><td><code>{escape(repr(text))}</code></td><td>{clean:.1%}</td><td>{changed:.1%}</td></tr>"
            for text, clean, changed in viewed.top
        )
        self.table.value = f"<table><tr><th>next token</th><th>clean</th><th>patched</th></tr>{cells}</table>"

    def _repr_mimebundle_(self, **options) -> dict[str, object]:
        bundle = super()._repr_mimebundle_(**options)
        picture = base64.b64encode(self.picture.value).decode()
        return bundle | {"image/png": picture, "text/plain": "a panel of controls"}


def panel(model: Model, life: Lifecycle, prompt: str = "The old clock at the station ran backwards.") -> Panel:
    """Controls for one cut of one prompt of at most 64 tokens: where, which channels, by what factor."""
    return Panel(model, life, prompt)
