"""Downloads from a server on this machine that breaks connections, lies about sizes and sends hostile archives."""

import io
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from scene_files import box, write_scene
from typer.testing import CliRunner

from roomplan_lib import download
from roomplan_lib.cli import app
from roomplan_lib.download import Step, arkitscenes_folds, download_arkitscenes, fetch, read_scene_list, unpack
from roomplan_lib.scenes.arkitscenes import read_scene

SCENE = "41048143"
BYTES = np.random.default_rng(0).bytes(300_000)


class Server:
    """Files by path, and what the server does wrong with them; `asked` counts the requests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}  # per path, one for each coming request
        self.tags = True
        self.ranges = True
        self.asked: Counter = Counter()
        self.wanted: list[tuple[str, str]] = []  # (path, its Range)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args) -> None:
                pass

            def do_GET(self) -> None:
                outer.answer(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, asked = request.path, request.headers.get("Range", "")
        self.asked[path] += 1
        self.wanted.append((path, asked))
        fault = self.faults[path].pop(0) if self.faults.get(path) else None
        if isinstance(fault, int) or path not in self.files:
            request.send_error(fault or 404)
            return
        content, tag = self.files[path], f'"{hash(self.files[path])}"'
        total = len(content) + (1000 if fault == "announces more" else 0)
        start = 0
        same = request.headers.get("If-Range", tag) == tag
        if asked and self.ranges and same:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= total:
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(content)}")
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if fault != "no size":
            request.send_header("Content-Length", str(total - start))
        if self.tags:
            request.send_header("ETag", tag)
        request.end_headers()
        sent = content[start:]
        if fault == "cut":
            sent = sent[: len(sent) // 2]
        request.wfile.write(sent)
        request.close_connection = True


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """The command waits between tries; here the server need not recover."""
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def step_of(server, tmp_path, name: str = "file.bin") -> Step:
    server.files[f"/{name}"] = BYTES
    return Step(f"{server.url}/{name}", tmp_path / "folder" / name)


def get(step: Step) -> None:
    fetch(step, wait=0.001, progress=False)


def names(folder: Path) -> list[str]:
    """Of the files in a folder, but for the sizes that are kept beside them."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".size")


def test_file_comes_whole_and_once(server, tmp_path):
    step = step_of(server, tmp_path)
    get(step)
    get(step)
    assert step.path.read_bytes() == BYTES and server.asked["/file.bin"] == 1
    assert names(step.path.parent) == ["file.bin"]


def test_a_file_cut_short_after_it_came_is_fetched_again(server, tmp_path):
    step = step_of(server, tmp_path)
    get(step)
    step.path.write_bytes(BYTES[:3])
    assert not step.done
    get(step)
    assert step.path.read_bytes() == BYTES and server.asked["/file.bin"] == 2
    step.path.with_name("own.bin").write_bytes(b"put there by hand")
    assert Step(step.url, step.path.with_name("own.bin")).done


def test_assets_may_have_spaces_around_them(tmp_path):
    spaced = download.arkitscenes_steps({SCENE: "Training"}, tmp_path, assets=["mesh", " annotation "])
    assert spaced == download.arkitscenes_steps({SCENE: "Training"}, tmp_path, assets=["mesh", "annotation"])


@pytest.mark.parametrize("tags", [True, False])
def test_cut_connections_go_on_where_they_broke(server, tmp_path, tags):
    """Nine cuts are more than MAX_TRIES, but each brought something."""
    server.tags = tags
    step = step_of(server, tmp_path)
    server.faults["/file.bin"] = ["cut"] * 9
    get(step)
    assert step.path.read_bytes() == BYTES and names(step.path.parent) == ["file.bin"]
    starts = [int(asked[6:-1]) for _, asked in server.wanted[1:]]
    assert starts == sorted(set(starts)) and starts[0] == 150_000 and len(starts) == 9


def test_interrupted_run_goes_on(server, tmp_path):
    step = step_of(server, tmp_path)
    server.faults["/file.bin"] = ["cut", *[500] * 20]
    with pytest.raises(ValueError, match=r"file.bin: HTTP 500 .*in each of 5 tries"):
        get(step)
    assert not step.path.exists() and (tmp_path / "folder" / "file.bin.part").stat().st_size == 150_000
    server.faults.clear()
    get(step)
    assert step.path.read_bytes() == BYTES
    assert server.wanted[-1] == ("/file.bin", "bytes=150000-")


def test_another_version_is_not_glued_to_the_old_one(server, tmp_path):
    step = step_of(server, tmp_path)
    server.faults["/file.bin"] = ["cut", *[503] * 20]
    with pytest.raises(ValueError, match="503"):
        get(step)
    server.faults.clear()
    server.files["/file.bin"] = BYTES[::-1]
    get(step)
    assert step.path.read_bytes() == BYTES[::-1]


def test_server_without_ranges_sends_all_again(server, tmp_path):
    server.ranges = False
    step = step_of(server, tmp_path)
    server.faults["/file.bin"] = ["cut", "cut"]
    get(step)
    assert step.path.read_bytes() == BYTES and server.asked["/file.bin"] == 3


def test_part_that_is_already_whole_or_too_long(server, tmp_path):
    step = step_of(server, tmp_path)
    part = tmp_path / "folder" / "file.bin.part"
    for left in (BYTES, BYTES + b"more"):
        part.parent.mkdir(exist_ok=True)
        part.write_bytes(left)
        get(step)
        assert step.path.read_bytes() == BYTES and not part.exists()
        step.path.unlink()


@pytest.mark.parametrize(
    ("fault", "words", "tries"),
    [
        (404, "HTTP 404 .*check scene id, fold and asset", 1),
        (403, "HTTP 403", 1),
        (503, "HTTP 503 .*in each of 5 tries", 5),
        ("announces more", "got 300000 of 301000 bytes", 5),
        ("no size", "does not tell the size", 1),
    ],
)
def test_no_half_file_under_the_final_name(server, tmp_path, fault, words, tries):
    step = step_of(server, tmp_path)
    server.faults["/file.bin"] = [fault] * 20
    with pytest.raises(ValueError, match=words):
        get(step)
    assert not step.path.exists() and server.asked["/file.bin"] >= tries


def test_silent_server_and_no_server(server, tmp_path):
    step = Step("http://127.0.0.1:9/x", tmp_path / "x")
    with pytest.raises(ValueError, match="http://127.0.0.1:9/x: .*refused"):
        get(step)
    with pytest.raises(ValueError, match="expected http"):
        download_arkitscenes(tmp_path, [SCENE], split="Training", url=f"file://{tmp_path}")


# Archives -------------------------------------------------------------------------------------------------------------


def archive(path: Path, members: dict[str, bytes | str], method=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as content:
        for name, data in members.items():
            content.writestr(name, data)
    return path


def test_archive_is_unpacked_whole(tmp_path):
    path = archive(tmp_path / "lowres_wide.zip", {"lowres_wide/": b"", "lowres_wide/a/1.png": BYTES})
    unpack(path, tmp_path / "lowres_wide")
    assert (tmp_path / "lowres_wide" / "a" / "1.png").read_bytes() == BYTES
    assert names(tmp_path) == ["lowres_wide", "lowres_wide.zip"]


def link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("lowres_wide/link")
    info.external_attr = 0o120777 << 16
    return info


HOSTILE = {
    "climbs": ({"lowres_wide/../../evil": b"x"}, "is not below lowres_wide/"),
    "absolute": ({"/tmp/evil": b"x"}, "is not below"),
    "beside": ({"other/x": b"x"}, "is not below"),
    "backslash": ({"lowres_wide/..\\..\\evil": b"x"}, "is not below"),
    "link": ({link(): b"/etc/passwd"}, "is a link"),
    "bomb": ({"lowres_wide/x": bytes(300_000_000)}, "would become 300000000"),
    "empty": ({}, "it is empty"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archive_is_refused(tmp_path, name):
    members, words = HOSTILE[name]
    (tmp_path / "in").mkdir()
    path = archive(tmp_path / "in" / "lowres_wide.zip", members)
    with pytest.raises(ValueError, match=words):
        unpack(path, tmp_path / "in" / "lowres_wide")
    assert names(tmp_path / "in") == ["lowres_wide.zip"] and names(tmp_path) == ["in"]


def test_broken_archive_is_removed(tmp_path):
    path = archive(tmp_path / "lowres_wide.zip", {"lowres_wide/x": BYTES, "lowres_wide/y": BYTES}, zipfile.ZIP_STORED)
    good = path.read_bytes()
    for bad in (good[:-100], good[:1000] + b"#" + good[1001:], b"no zip", b""):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="lowres_wide.zip: broken archive .*removed; run the same command again"):
            unpack(path, tmp_path / "lowres_wide")
        assert names(tmp_path) == []


# Scenes ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(server, tmp_path):
    """A server with two scans in Apple's places; the first of them lies in `tmp_path / "source"`."""
    for scene_id, fold in ((SCENE, "Training"), ("41159519", "Validation")):
        folder = write_scene(tmp_path / "source", [box("bed", 1, 1)], scene_id=scene_id, fold=fold, layout="raw")
        for path in folder.iterdir():
            if path.is_file():
                server.files[f"/raw/{fold}/{scene_id}/{path.name}"] = path.read_bytes()
            else:
                data = io.BytesIO()
                with zipfile.ZipFile(data, "w") as content:
                    for file in path.iterdir():
                        content.write(file, f"{path.name}/{file.name}")
                server.files[f"/raw/{fold}/{scene_id}/{path.name}.zip"] = data.getvalue()
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as content:
            for file in folder.rglob("*"):
                content.write(file, f"{scene_id}/{file.relative_to(folder)}")
        server.files[f"/threedod/{fold}/{scene_id}.zip"] = data.getvalue()
        server.files[f"/raw/{fold}/{scene_id}/{scene_id}_3dod_mesh.ply"] = b"ply\n"
    table = "video_id,visit_id,sky_direction,fold,is_in_upsampling\n41048143,1,Up,Training,False\n"
    table += "41159519,381879,Up,Validation,True\n"
    server.files["/raw/metadata.csv"] = server.files["/threedod/metadata.csv"] = table.encode()
    return server


def run(*arguments):
    return CliRunner().invoke(app, ["download", "arkitscenes", *map(str, arguments)])


@pytest.mark.parametrize("dataset", ["raw", "3dod"])
def test_fetched_scene_is_the_one_on_the_server(mirror, tmp_path, dataset):
    """By the command, with the fold from the table that the server has."""
    for path in mirror.files:
        mirror.faults[path] = ["cut", 503]
    output = tmp_path / "data"
    result = run("--output", output, "--scenes", SCENE, "41159519", "--dataset", dataset, "--url", mirror.url,
                 "--accept-licence")  # fmt: skip
    assert result.exit_code == 0, result.output
    for scene_id, fold in ((SCENE, "Training"), ("41159519", "Validation")):
        scene = read_scene(output / dataset / fold / scene_id)
        again = read_scene(tmp_path / "source" / fold / scene_id)
        assert len(scene.views) == len(again.views) == 8 and scene.visit_id == ("1" if fold == "Training" else "381879")
        assert all((a.load_rgb() == b.load_rgb()).all() for a, b in zip(scene.views, again.views, strict=True))
    assert not [path for path in output.rglob("*") if path.suffix in (".part", ".tag", ".zip")]
    asked = mirror.asked.total()
    assert run("--output", output, "--scenes", SCENE, "--dataset", dataset, "--url", mirror.url,
               "--accept-licence").exit_code == 0  # fmt: skip
    assert mirror.asked.total() == asked  # all of it was there


def test_missing_asset_is_named_and_the_rest_is_fetched(mirror, tmp_path):
    del mirror.files[f"/raw/Training/{SCENE}/lowres_depth.zip"]
    arguments = ("--output", tmp_path / "data", "--scenes", SCENE, "--split", "Training", "--url", mirror.url)
    result = run(*arguments, "--accept-licence")
    assert result.exit_code == 1
    assert "1 of 6 files could not be fetched; run the same command again" in result.stderr
    assert "lowres_depth.zip: HTTP 404" in result.stderr
    folder = tmp_path / "data" / "raw" / "Training" / SCENE
    assert names(folder) == [
        "41048143_3dod_annotation.json", "41048143_3dod_mesh.ply", "lowres_wide", "lowres_wide.traj",
        "lowres_wide_intrinsics",
    ]  # fmt: skip


def test_server_without_a_table_needs_a_split(mirror, tmp_path):
    del mirror.files["/raw/metadata.csv"]
    choice = {"url": mirror.url, "assets": ["annotation"], "progress": False, "wait": 0.001}
    with pytest.raises(ValueError, match="nothing tells the fold of 41048143; give --split"):
        download_arkitscenes(tmp_path / "a", [SCENE], **choice)
    assert download_arkitscenes(tmp_path / "a", [SCENE], split="train", **choice) == [
        tmp_path / "a" / "raw" / "Training" / SCENE
    ]


def test_printed_steps_do_the_same(mirror, tmp_path):
    """Without the licence accepted nothing is fetched; the printed lines, run by a shell, fetch the scene."""
    arguments = ("--output", tmp_path / "data", "--scenes", SCENE, "--split", "Training", "--url", mirror.url)
    for result in (run(*arguments), run(*arguments, "--accept-licence", "--dry-run")):
        assert result.exit_code == 0 and "LICENSE" in result.output and not mirror.asked
    if shutil.which("curl") is None:
        pytest.skip("curl is not on this machine")
    unzip = tmp_path / "bin" / "unzip"  # many machines have none
    unzip.parent.mkdir()
    unzip.write_text(f'#!/bin/sh\nexec {sys.executable} -m zipfile -e "$2" "$4"\n')
    unzip.chmod(0o755)
    path = f"{unzip.parent}{os.pathsep}{os.environ['PATH']}"
    shell = subprocess.run(
        ["bash", "-e"], input=result.output, text=True, capture_output=True, env={**os.environ, "PATH": path}
    )
    assert shell.returncode == 0, shell.stderr
    assert len(read_scene(tmp_path / "data" / "raw" / "Training" / SCENE).views) == 8


def test_addresses_of_apple(tmp_path):
    """As the published script composes them, with its list of scans that have no annotation."""
    folds = {SCENE: "Training", "47334522": "Validation"}
    steps = download.arkitscenes_steps(folds, tmp_path, assets=["lowres_wide", "annotation", "highres_depth"])
    base = "https://docs-assets.developer.apple.com/ml-research/datasets/arkitscenes/v1"
    assert [step.url for step in steps] == [
        f"{base}/raw/Training/{SCENE}/lowres_wide.zip",
        f"{base}/raw/Training/{SCENE}/{SCENE}_3dod_annotation.json",
        f"{base}/raw/Training/{SCENE}/highres_depth.zip",
        f"{base}/raw/Validation/47334522/lowres_wide.zip",
        f"{base}/raw/Validation/47334522/highres_depth.zip",
    ]
    some = download.arkitscenes_steps(folds, tmp_path, assets=["highres_depth"], upsampling={"47334522"})
    assert [step.path.parent.name for step in some] == ["47334522"]
    whole = download.arkitscenes_steps(folds, tmp_path, "3dod")
    assert [step.url for step in whole] == [
        f"{base}/threedod/Training/{SCENE}.zip",
        f"{base}/threedod/Validation/47334522.zip",
    ]
    assert download.metadata_step(tmp_path, "3dod").url == f"{base}/threedod/metadata.csv"
    assert len(download.BARE_SCANS) == 24 and len(download.ASSET_FILES) == 13


def test_lists_of_scenes(tmp_path):
    table = tmp_path / "some.csv"
    table.write_text("video_id,fold\n41048143,Training\n41159519,Validation\n")
    assert read_scene_list(table, "val") == {"41159519": "Validation"}
    assert arkitscenes_folds([], table, None, tmp_path / "none") == {SCENE: "Training", "41159519": "Validation"}
    assert arkitscenes_folds([SCENE], table, None, tmp_path / "none") == {SCENE: "Training"}
    for text, words in (
        ("video_id\n1\n", "expected the columns"),
        ("video_id,fold\n../../etc,Training\n", "some.csv:2: expected a video id"),
        ("video_id,fold\n41048143,Testing\n", "some.csv:2: fold: expected one of"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_scene_list(table)
    official = Path(__file__).parents[2] / "shared" / "data" / "arkitscenes_meta" / "3dod_train_val_splits.csv"
    if official.is_file():
        folds = list(read_scene_list(official).values())
        assert (folds.count("Training"), folds.count("Validation")) == (4498, 549)


@pytest.mark.parametrize("name", ["scannet", "scanqa", "sqa3d"])
def test_other_data_sets_tell_licence_and_folders(name):
    result = CliRunner().invoke(app, ["download", name, "--output", "somewhere"])
    assert result.exit_code == 0 and "Licence: " in result.output and "Expected" in result.output
    assert "  somewhere/" in result.output and "roomplan prepare " in result.output
