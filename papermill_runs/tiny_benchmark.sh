#!/usr/bin/env bash
# The rows of equal budget of the README's table: papermill_runs/params/tiny_rooms.yaml for 1,300 steps with one thing
# changed, then its answers about 60 rooms kept apart and 60 unusual ones. Three rows of twice the steps show what more
# rooms give: rooms60, rooms240 and rooms1920 are trained on as many.
#   bash papermill_runs/tiny_benchmark.sh            # every row, ten minutes each on one CPU core
#   bash papermill_runs/tiny_benchmark.sh ours base  # these alone
#   bash papermill_runs/tiny_benchmark.sh --stages   # writes every row's stage files and stops
# Run it from the project's folder, `roomplan` on the PATH, after the commands at the head of tiny_rooms.yaml and
#   roomplan rooms --output data/raw/unusual60 --num-rooms 60 --seed 43 --frame-rate 10 --unusual
#   roomplan prepare arkitscenes --root data/raw/unusual60 --output data/processed/unusual60 --split val \
#     --tasks anchors,qa,lists,negatives
# and for rooms60 and rooms240, with n = 75 and 300, of which every fifth is kept apart:
#   roomplan rooms --output data/raw/rooms$n --num-rooms $n --seed 41 --frame-rate 10
#   roomplan prepare arkitscenes --root data/raw/rooms$n --output data/processed/rooms$n --split train \
#     --view-sets 3 --tasks anchors,qa,lists,negatives
# A row that was trained is kept, one that was stopped goes on; each lands in papermill_runs/tiny_benchmark/<row>.
set -euo pipefail

stage=papermill_runs/params/tiny_rooms.yaml
runs=papermill_runs/tiny_benchmark

files() { # FOLDER SPLIT: the records of a folder as a YAML list without spaces
  local kind list=""
  for kind in anchors qa lists negatives; do list+=",data/processed/$1/${kind}_$2.jsonl"; done
  echo "[${list:1}]"
}

declare -A changes=(
  [ours]=""
  [seed1]="seed=1"
  [seed2]="seed=2"
  [rooms60]="training.max_steps=2600 data.train_files=$(files rooms75 train)"
  [rooms240]="training.max_steps=2600 data.train_files=$(files rooms300 train)"
  [rooms1920]="training.max_steps=2600"
  [sin3d]="model.positions.method=sin3d_pe"
  [base]="model.positions.method=base"
  [places]="model.resampler.num_latents=192"
  [no_geometry]="model.geometry.num_tokens=0"
  [random]="model.vggt_weights=''"
  [end_to_end]="model.freeze_vggt=false data.features.folder='' data.features.resident=none training.encoder_learning_rate=3.0e-4"
)
order=(ours seed1 seed2 rooms60 rooms240 rooms1920 sin3d base places no_geometry random end_to_end)

only_stages=false
[[ "${1:-}" != --stages ]] || { only_stages=true; shift; }
rows=("${@:-${order[@]}}")
for row in "${rows[@]}"; do
  [[ -v "changes[$row]" ]] || { echo "tiny_benchmark.sh: no row $row; known: ${order[*]}" >&2; exit 2; }
done

write_stage() { # NAME CHANGES...: writes the stage file of a run, prints its path
  roomplan stage "$stage" runs_dir="$runs" run_name="$1" training.max_steps=1300 training.eval_every_steps=325 "${@:2}"
}

answers=()
for row in "${rows[@]}"; do
  read -ra changed <<<"${changes[$row]}"
  controls="[]"
  [[ $row != ours ]] || controls="[blind,shuffled,one_view]"
  usual=$(write_stage "$row" "${changed[@]}" prediction.controls="$controls")
  unusual=$(write_stage "${row}_unusual" "${changed[@]}" prediction.controls="$controls" prediction.num_scenes=0 \
    data.eval_files="$(files unusual60 val)")
  ! $only_stages || continue
  roomplan train "$usual"
  roomplan predict "$usual"
  roomplan predict "$unusual" --checkpoint "$runs/$row/model"
  answers+=("$runs/${row}_unusual/predictions/model")
done
$only_stages || roomplan compare "${rows[@]/#/$runs/}" "${answers[@]}"
