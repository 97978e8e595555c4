"""Figures of scenes, cameras, boxes, curves and scores. True is blue, predicted is orange, lengths are in metres."""

from roomplan_lib.viz.anchors import anchors_figure, compared_figure, save_anchors_figure
from roomplan_lib.viz.birds_eye import birds_eye_figure
from roomplan_lib.viz.boxes import draw_boxes_on_view
from roomplan_lib.viz.browser import anchor_browser
from roomplan_lib.viz.clouds import scene_cloud
from roomplan_lib.viz.comparison import comparison_rows, comparison_table, comparison_traces, pair_up
from roomplan_lib.viz.curves import LiveCurve, curve_figure
from roomplan_lib.viz.errors import (
    bins_figure,
    calibration_figure,
    failure_examples,
    failures_figure,
    failures_table,
    reach_figure,
)
from roomplan_lib.viz.full_cloud import full_cloud
from roomplan_lib.viz.fusion import fuse_depth, fuse_scene
from roomplan_lib.viz.gallery import examples_figure, gallery_figure
from roomplan_lib.viz.interactive import comparison_figure, scene_figure, surfaces_figure
from roomplan_lib.viz.maps import maps_figure
from roomplan_lib.viz.meshes import mesh_surfels, render_mesh, render_scene, scene_mesh
from roomplan_lib.viz.records import (
    answers_figure,
    browse_records,
    by_source,
    by_split,
    coverage_figure,
    labels_figure,
    lengths_figure,
    overlap_table,
    read_files,
    record_figure,
    records_table,
    tasks_table,
)
from roomplan_lib.viz.rooms import room_figure, scene_table, views_figure
from roomplan_lib.viz.style import CAMERA_COLOR, PREDICTED_COLOR, TRUE_COLOR
from roomplan_lib.viz.tables import runs_table, scores_figure, scores_table

__all__ = [
    "CAMERA_COLOR",
    "PREDICTED_COLOR",
    "TRUE_COLOR",
    "LiveCurve",
    "anchor_browser",
    "anchors_figure",
    "answers_figure",
    "birds_eye_figure",
    "bins_figure",
    "browse_records",
    "by_source",
    "by_split",
    "calibration_figure",
    "compared_figure",
    "comparison_figure",
    "comparison_rows",
    "comparison_table",
    "comparison_traces",
    "coverage_figure",
    "curve_figure",
    "draw_boxes_on_view",
    "full_cloud",
    "fuse_depth",
    "fuse_scene",
    "examples_figure",
    "failure_examples",
    "failures_figure",
    "failures_table",
    "gallery_figure",
    "labels_figure",
    "lengths_figure",
    "maps_figure",
    "mesh_surfels",
    "overlap_table",
    "pair_up",
    "reach_figure",
    "read_files",
    "record_figure",
    "records_table",
    "render_mesh",
    "render_scene",
    "room_figure",
    "runs_table",
    "save_anchors_figure",
    "scene_cloud",
    "scene_figure",
    "scene_mesh",
    "scene_table",
    "scores_figure",
    "scores_table",
    "surfaces_figure",
    "tasks_table",
    "views_figure",
]
