"""Figures of scenes, cameras, boxes, curves and scores. True is blue, predicted is orange, lengths are in metres."""

from roomplan_lib.viz.anchors import anchors_figure, save_anchors_figure
from roomplan_lib.viz.boxes import draw_boxes_on_view
from roomplan_lib.viz.clouds import scene_cloud
from roomplan_lib.viz.curves import LiveCurve, curve_figure
from roomplan_lib.viz.interactive import scene_figure
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
from roomplan_lib.viz.rooms import room_figure, views_figure
from roomplan_lib.viz.style import CAMERA_COLOR, PREDICTED_COLOR, TRUE_COLOR
from roomplan_lib.viz.tables import scores_figure, scores_table

__all__ = [
    "CAMERA_COLOR",
    "PREDICTED_COLOR",
    "TRUE_COLOR",
    "LiveCurve",
    "anchors_figure",
    "answers_figure",
    "browse_records",
    "by_source",
    "by_split",
    "coverage_figure",
    "curve_figure",
    "draw_boxes_on_view",
    "labels_figure",
    "lengths_figure",
    "overlap_table",
    "read_files",
    "record_figure",
    "records_table",
    "room_figure",
    "save_anchors_figure",
    "scene_cloud",
    "scene_figure",
    "scores_figure",
    "scores_table",
    "tasks_table",
    "views_figure",
]
