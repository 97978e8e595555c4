# Sourced by the batch files, in the project's folder: messages with their time, Python, caches on local scratch.
#
# Python comes from ROOMPLAN_ENV: a virtual environment's folder or a conda environment's name. Default: .venv if it
# is there, else the conda environment roomplan.
say() { echo "$(date '+%F %T') ${SLURM_JOB_NAME:-roomplan}: $*"; }
fail() {
  say "$*" >&2
  exit 1
}

[ -f notebooks/03_train.ipynb ] || fail "submit from the project's folder; $PWD holds no notebooks/03_train.ipynb"
environment=${ROOMPLAN_ENV:-.venv}
if [ -f "$environment/bin/activate" ]; then
  . "$environment/bin/activate"
else
  if ! command -v conda >/dev/null && command -v module >/dev/null; then module load conda; fi
  command -v conda >/dev/null || fail "neither $environment/bin/activate nor conda is here; make install, or set ROOMPLAN_ENV"
  [ "$environment" != .venv ] || environment=roomplan
  set +u # conda's scripts read variables that may be unset
  . "$(conda info --base)/etc/profile.d/conda.sh"
  conda activate "$environment" || fail "conda activate $environment failed; conda env create -f environment.yml"
  set -u
fi
caches=$(python -m roomplan_lib.system --caches) || fail "$(command -v python) cannot import roomplan_lib; pip install -e . there"
eval "$caches"

array_part() { # I/N of this array task, counted from 1
  local first=${SLURM_ARRAY_TASK_MIN:-1} last=${SLURM_ARRAY_TASK_MAX:-1} count=${SLURM_ARRAY_TASK_COUNT:-1}
  [ $((last - first + 1)) = "$count" ] || fail "submit all parts, e.g. --array=1-$count; those that are done end at once"
  echo "$((${SLURM_ARRAY_TASK_ID:-1} - first + 1))/$count"
}
