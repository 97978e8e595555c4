"""What every notebook keeps to, and that they run, one after the other, on what the ones before have made."""

import ast
import json
import statistics
from pathlib import Path

import pytest

from roomplan_lib.evaluation.rows import baseline_predictions

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
MOST_LINES, MEDIAN_LINES = 20, 6
MOST_BYTES = 3_000_000  # of an executed copy


def cells(path: Path, kind: str) -> list[dict]:
    notebook = json.loads(path.read_text())
    return [
        cell | {"source": "".join(cell["source"])} for cell in notebook["cells"] if kind in ("any", cell["cell_type"])
    ]


def is_parameters(cell: dict) -> bool:
    return "parameters" in cell["metadata"].get("tags", [])


def test_the_set_is_whole():
    assert NAMES == [
        "00_prepare_data", "01_inspect_data", "02_view_scene", "03_train", "04_error_analysis", "05_compare_anchors",
    ]  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_cells_are_short_and_define_nothing(path):
    code = [cell["source"] for cell in cells(path, "code")]
    lengths = [len(source.splitlines()) for source in code]
    assert max(lengths) <= MOST_LINES and statistics.median(lengths) <= MEDIAN_LINES, lengths
    for source in code:
        tree = ast.parse(source)
        defined = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
        assert not defined, defined[0].name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_outputs_are_stripped(path):
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None and set(cell["metadata"]) <= {"tags"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_parameters_are_typed_and_explained(path):
    found = [cell["source"] for cell in cells(path, "code") if is_parameters(cell)]
    assert len(found) == 1
    for line, statement in zip(found[0].splitlines(), ast.parse(found[0]).body, strict=True):
        assert isinstance(statement, ast.AnnAssign), f"{line}: name: type = value"
        default = ast.literal_eval(statement.value)
        assert type(default).__name__ == statement.annotation.id, line
        assert len(line.split("  # ", 1)[-1]) > 10 and "  # " in line, f"{line}: says what it is"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_the_first_cell_tells_and_the_last_names_the_next(path):
    first, last = (cells(path, "any")[i] for i in (0, -1))
    assert first["cell_type"] == last["cell_type"] == "markdown"
    for word in ("**Reads**", "**Writes**", "**Takes**"):
        assert word in first["source"], word
    following = NAMES[(NAMES.index(path.stem) + 1) % len(NAMES)]
    assert f"{following}.ipynb" in last["source"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder in which notebooks run as in the project: their paths are relative to it."""
    return tmp_path_factory.mktemp("project")


# The folders that the notebooks of a newcomer share; 03 is run by other tests, with steps of its own.
PARAMETERS = {
    "00_prepare_data": {"num_rooms": 5, "num_views": 4},
    "01_inspect_data": {},
    "02_view_scene": {"num_views": 4},
    "04_error_analysis": {},
    "05_compare_anchors": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_notebooks_run_and_stay_small(name, project):
    """In this order, in an empty folder: 04 and 05 find no run, and look at the constant baseline."""
    import papermill

    output = project / f"{name}.ipynb"
    path = next(path for path in NOTEBOOKS if path.stem == name)
    papermill.execute_notebook(path, output, PARAMETERS[name], cwd=project, progress_bar=False)
    assert output.stat().st_size < MOST_BYTES
    executed = json.loads(output.read_text())
    assert not executed["metadata"].get("widgets"), "the state of widgets that nobody can operate is stored"


def test_05_runs_on_rows_of_another_program(tmp_path):
    """index, scene_id, question, prediction, reference and nothing else; some texts are no actions."""
    import papermill

    anchor = '{"action":"place_anchor","category":"bed","center":[1,%d,0.5],"normal":[1,0,0],"extent":[2,1.5,1]}'
    rows = [
        {"scene_id": "a", "question": "Where is the bed?", "prediction": anchor % 1, "reference": anchor % 2},
        {"scene_id": "a", "question": "Where is the sofa?", "prediction": "{'action': <b>", "reference": anchor % 2},
        {"scene_id": "b", "question": "What colour?", "prediction": "red </td>", "reference": "dark red"},
    ]
    file = tmp_path / "theirs.jsonl"
    file.write_text("".join(json.dumps({"index": i} | row) + "\n" for i, row in enumerate(rows)))
    path = next(path for path in NOTEBOOKS if path.stem == "05_compare_anchors")
    parameters = {"predictions": [str(file)], "output": str(tmp_path / "out")}
    executed = papermill.execute_notebook(path, tmp_path / "05.ipynb", parameters, cwd=tmp_path, progress_bar=False)
    page = json.dumps(executed)
    assert (tmp_path / "out" / "compared.png").is_file() and list((tmp_path / "out").glob("*.glb"))
    assert "&lt;b&gt;" in page and "does not tell where the scene" in page


def test_05_writes_the_shown_room_in_four_formats(sample_files, tmp_path):
    import papermill

    from roomplan_lib.export import load_room

    file = baseline_predictions(list(sample_files.values()), tmp_path / "constant" / "predictions.jsonl")
    path = next(path for path in NOTEBOOKS if path.stem == "05_compare_anchors")
    parameters = {"predictions": [str(file)], "output": str(tmp_path / "out")}
    papermill.execute_notebook(path, tmp_path / "05.ipynb", parameters, cwd=tmp_path, progress_bar=False)
    assert (tmp_path / "05.ipynb").stat().st_size < MOST_BYTES
    written = {file.suffix: file for file in (tmp_path / "out").glob("*_constant.*")}
    assert set(written) == {".json", ".usdz", ".glb", ".png"}
    room = load_room(written[".json"])
    assert room.boxes and room.surfaces
