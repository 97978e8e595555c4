"""A plotly figure that leaves a still picture where nothing can turn it. Needs plotly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import plotly.graph_objects as go

from roomplan_lib.files import write_whole
from roomplan_lib.viz.style import PrintFigure


class TurnableFigure(go.Figure):
    """JupyterLab shows it with its own plotly, so that notebooks hold the data alone; exported HTML, and whatever else
    knows no plotly, shows `still()`, a picture of the same."""

    _ipython_display_ = None  # go.Figure's own would hand over to a renderer, which drops the still picture
    _repr_html_ = None  # and this one would store the data a second time

    def __init__(self, *args, still: Callable[[], PrintFigure] | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._still = still

    def still(self) -> PrintFigure:
        """The picture for print."""
        assert self._still is not None, "made without a still picture"
        return self._still()

    def _repr_mimebundle_(self, include=None, exclude=None, **kwargs) -> dict:
        title = self.layout.title.text or "a figure to turn"
        bundle = {"application/vnd.plotly.v1+json": json.loads(self.to_json()), "text/plain": title}
        if self._still is not None:
            bundle["image/png"] = self._still()._repr_png_()
        return bundle

    def save(self, path: Path | str) -> Path:
        """One HTML file that turns by itself and asks no server; 5 MB of it are plotly. Returns `path`."""
        write_whole(path, self.to_html(include_plotlyjs=True, config={"displaylogo": False, "responsive": True}))
        return Path(path)
