"""One convention of colours and type for every figure. Colours: Okabe and Ito (2008), safe for colour blindness."""

from __future__ import annotations

import io

from matplotlib import patheffects
from matplotlib.figure import Figure
from PIL import Image

TRUE_COLOR = "#0072B2"  # blue
PREDICTED_COLOR = "#D55E00"  # orange; the brighter #E69F00 is lost on white paper and on wood
CAMERA_COLOR = "#222222"
DASHES = (0, (3.5, 1.1))  # of predicted edges: a second cue beside colour
CONTROL_COLOR = "#7F7F7F"
RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
RUN_DASHES = ("-", "--", "-.", ":")  # a second cue beside colour
# Colours of an overlap from 0 to 1, dark purple to light green: the order shows in their lightness alone.
IOU_SCALE = ((0.0, "#4B0A3F"), (0.25, "#7A2C73"), (0.5, "#8C6F9A"), (0.75, "#86A98F"), (1.0, "#74D36A"))
ROOM_COLOR = "#8A8A8A"  # walls, doors and windows as lines; floor grid
FONT_SIZE = 8.0  # points; figures are 9 inches wide, so this is about 11 pixels in a page 900 pixels wide
WIDTH = 9.0  # inches
DPI = 160


class PrintFigure(Figure):
    """A figure outside pyplot: nothing to close, and a notebook shows it once, with or without an inline backend."""

    def __init__(self, height: float, width: float = WIDTH, *, few_colors: bool = False) -> None:
        """Size in inches. few_colors: notebooks store it in 256 colours, which is a third of the bytes; for
        photographs and rooms, not for colour scales."""
        super().__init__(figsize=(width, height), dpi=DPI, facecolor="white")
        self.few_colors = few_colors

    def _repr_png_(self) -> bytes:
        drawn = io.BytesIO()
        self.savefig(drawn, format="png")
        if not self.few_colors:
            return drawn.getvalue()
        small = io.BytesIO()
        Image.open(drawn).convert("RGB").quantize(256).save(small, format="png", dpi=(DPI, DPI))
        return small.getvalue()


def halo(width: float = 2.0) -> list:
    """A white casing, so that lines and letters stand out on any picture."""
    return [patheffects.withStroke(linewidth=width, foreground="white", alpha=0.9)]


def plain_axes(ax) -> None:
    """Axes without the upper and right line, with small type and a light grid."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=FONT_SIZE)
    ax.grid(True, color="#E6E6E6", linewidth=0.6)
    ax.set_axisbelow(True)
