#!/usr/bin/env bash
# Rows of the README's table: papermill_runs/params/tiny_rooms.yaml for 1,300 steps with one thing changed, then its
# answers about 60 rooms kept apart and 60 unusual ones. Then three of 2,600 steps for papermill_runs/README.md, which
# show what more rooms give: rooms60, rooms240, rooms1920 (their frozen encoder has seen 1,325 in all of them).
#   bash papermill_runs/tiny_benchmark.sh            # every row: ten minutes on one CPU core, end_to_end and rooms* more
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
order=(ours seed1 seed2 sin3d base places no_geometry random end_to_end rooms60 rooms240 rooms1920)

only_stages=false
[[ "${1:-}" != --stages ]] || { only_stages=true; shift; }
rows=("${@:-${order[@]}}")
for row in "${rows[@]}"; do
  [[ -v "changes[$row]" ]] || { echo "tiny_benchmark.sh: no row $row; known: ${order[*]}" >&2; exit 2; }
done

write_stage() { # NAME CHANGES...: writes the stage file of a run, prints its path
  roomplan stage "$stage" runs_dir="$runs" run_name="$1" training.max_steps=1300 training.eval_every_steps=325 "${@:2}"
}

declare -A usual unusual
for row in "${rows[@]}"; do
  read -ra changed <<<"${changes[$row]}"
  controls="[]"
  [[ $row != ours ]] || controls="[blind,shuffled,one_view]"
  usual[$row]=$(write_stage "$row" "${changed[@]}" prediction.controls="$controls")
  unusual[$row]=$(write_stage "${row}_unusual" "${changed[@]}" prediction.controls="$controls" \
    prediction.num_scenes=0 data.eval_files="$(files unusual60 val)")
done
! $only_stages || exit 0

needed="$(files rooms2400 val),$(files unusual60 val)" # looked for before hours are spent on the rows before
for row in "${rows[@]}"; do
  if [[ ${changes[$row]} == *train_files=* ]]; then needed+=",${changes[$row]##*train_files=}"
  else needed+=",$(files rooms2400 train)"; fi
done
for file in ${needed//[],[]/ }; do
  file=${file/#data/${ROOMPLAN_DATA:-data}}
  [[ -f $file ]] || { echo "tiny_benchmark.sh: $file is missing; the head of this script says how it is made" >&2; exit 1; }
done

answers=()
for row in "${rows[@]}"; do
  roomplan train "${usual[$row]}"
  roomplan predict "${usual[$row]}"
  roomplan predict "${unusual[$row]}" --checkpoint "$runs/$row/model"
  answers+=("$runs/${row}_unusual/predictions/model")
done
roomplan compare "${rows[@]/#/$runs/}" "${answers[@]}"
