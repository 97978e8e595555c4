"""Executed notebooks of a run as pages small enough for git: `python -m roomplan_lib.viz.pages RUN FOLDER`."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

from PIL import Image

from roomplan_lib.files import write_whole

MOST_BYTES = 1_500_000  # of a page
SCRATCH = Path("build/example")  # of the executed copies; relative, since pages show the parameters
WIDEST = 1100  # pixels of a picture
MADE = ("04_error_analysis", "05_compare_anchors")  # executed here; 03 is what made the run
# What a page without scripts cannot show; every output that has one of these has a picture or a table too.
DYNAMIC = ("application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json", "application/javascript")


def write_pages(run: Path, folder: Path) -> list[Path]:
    """03_train.html, 04_error_analysis.html and 05_compare_anchors.html of a run below `folder`; pictures have 256
    colours, scripts are left out.

    04 and 05 are executed on the run's predictions, 03 is the copy in the run's folder. Call in the project's folder.
    Raises ValueError for a run without that copy or predictions, and for a page of more than MOST_BYTES.
    """
    import nbformat
    import papermill

    for name in ("03_train.ipynb", "predictions.jsonl"):
        if not (run / name).is_file():
            raise ValueError(f"{run / name}: is missing; run it under papermill first (make quickstart)")
    executed, written = {"03_train": run / "03_train.ipynb"}, []
    for name in MADE:
        executed[name] = SCRATCH / f"{name}.ipynb"
        SCRATCH.mkdir(parents=True, exist_ok=True)
        parameters = {"predictions": [str(run)], "output": str(SCRATCH / name)}
        papermill.execute_notebook(f"notebooks/{name}.ipynb", executed[name], parameters)
    for name, path in executed.items():
        page = still_page(nbformat.read(path, as_version=4))
        if len(page.encode()) > MOST_BYTES:
            raise ValueError(f"{name}: the page has {len(page.encode()):,} bytes, more than {MOST_BYTES:,}")
        write_whole(folder / f"{name}.html", page)
        written.append(folder / f"{name}.html")
    return written


def still_page(notebook) -> str:
    """HTML of an executed notebook (nbformat 4) that asks no server for anything and runs no script of its outputs."""
    from nbconvert import HTMLExporter

    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data or "text/html" in data:
                for kind in DYNAMIC:
                    data.pop(kind, None)
            if "image/png" in data:
                data["image/png"] = _few_colours(data["image/png"])
    exporter = HTMLExporter(require_js_url="", mathjax_url="", jquery_url="", mermaid_js_url="")
    return exporter.from_notebook_node(notebook)[0]


def _few_colours(png: str) -> str:
    """A PNG in base64, WIDEST pixels wide at most, with 256 colours."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.thumbnail((WIDEST, 10 * WIDEST))
    buffer = io.BytesIO()
    picture.quantize(256).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    try:
        for page in write_pages(*map(Path, sys.argv[1:])):
            print(page, f"{page.stat().st_size / 1e6:.2f} MB")
    except ValueError as error:
        sys.exit(str(error))
