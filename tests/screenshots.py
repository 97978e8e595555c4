"""The README's screenshots of the notebooks: `python tests/screenshots.py RUN FIGURES`.

RUN is a run's folder with its executed 03_train.ipynb and predictions. Writes notebook_03.png, error_analysis.png and
anchor_browser.png, 1280 x 800 pixels of JupyterLab each, in 256 colours.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

import papermill
from lab import PROJECT, Lab, missing_browser, open_notebook, open_page, run_all, start_lab
from PIL import Image

HEADINGS = {"03_train": "Training", "04_error_analysis": "How answers fail"}  # what the picture begins with
SETTLE_MS = 4000  # until WebGL without a GPU has drawn


def take(run: Path, figures: Path) -> None:
    """Raises ValueError for a run without its notebook or predictions, and where no browser can be driven."""
    if missing := missing_browser():
        raise ValueError(missing)
    run = run.absolute()
    for name in ("03_train.ipynb", "predictions.jsonl"):
        if not (run / name).is_file():
            raise ValueError(f"{run / name}: is missing; run it under papermill first (make quickstart)")
    figures.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = project_links(Path(scratch) / "root")
        shutil.copy(run / "03_train.ipynb", root / "notebooks")
        parameters = {"predictions": [str(run)], "output": str(Path(scratch) / "output")}
        name = "04_error_analysis.ipynb"
        papermill.execute_notebook(PROJECT / "notebooks" / name, root / "notebooks" / name, parameters, cwd=PROJECT)
        write_with_parameters(PROJECT / "notebooks" / "05_compare_anchors.ipynb", root / "notebooks", parameters)
        with start_lab(root, Path(scratch) / "lab") as lab, open_page(lab) as page:
            save(executed(page, lab, "03_train"), figures / "notebook_03.png")
            save(executed(page, lab, "04_error_analysis"), figures / "error_analysis.png")
            save(browser(page, lab), figures / "anchor_browser.png")


def project_links(root: Path) -> Path:
    """A folder with links to the data and runs of the project, so that relative paths of its notebooks lead there."""
    (root / "notebooks").mkdir(parents=True)
    for name in ("data", "papermill_runs"):
        (root / name).symlink_to(PROJECT / name)
    return root


def write_with_parameters(notebook: Path, folder: Path, parameters: dict) -> Path:
    """A copy of a notebook whose parameters cell ends with other values."""
    copy = json.loads(notebook.read_text())
    cell = next(cell for cell in copy["cells"] if "parameters" in cell["metadata"].get("tags", []))
    cell["source"] = "".join(cell["source"]) + "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    (folder / notebook.name).write_text(json.dumps(copy))
    return folder / notebook.name


def executed(page, lab: Lab, name: str) -> bytes:
    """An executed notebook from the heading on that HEADINGS names."""
    open_notebook(page, lab, f"notebooks/{name}.ipynb", kernel=False)
    heading = page.locator(".jp-RenderedMarkdown h2", has_text=HEADINGS[name]).first
    heading.scroll_into_view_if_needed()
    heading.evaluate("e => e.scrollIntoView({block: 'start'})")
    page.wait_for_timeout(SETTLE_MS)
    return page.screenshot()


def browser(page, lab: Lab) -> bytes:
    """The anchor browser on the sample whose boxes overlap most, of those with an object."""
    open_notebook(page, lab, "notebooks/05_compare_anchors.ipynb")
    run_all(page)
    shown = page.locator(".anchor-browser").first
    task = shown.locator("select", has_text="task: all")
    if "place_anchor" in task.locator("option").all_text_contents():
        task.select_option("place_anchor")
    shown.locator("select", has_text="worst first").select_option("best first")
    shown.evaluate("e => e.scrollIntoView({block: 'start'})")
    page.wait_for_timeout(SETTLE_MS)
    return page.screenshot()


def save(picture: bytes, path: Path) -> None:
    """With 256 colours, a third of the size in git."""
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256).save(path, optimize=True)
    print(path, f"{path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    try:
        take(*map(Path, sys.argv[1:]))
    except ValueError as error:
        sys.exit(str(error))
