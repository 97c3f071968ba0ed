#!/usr/bin/env bash
# Runs the notebooks of a profile, from training to figures, and installs what they need first.
#
#   ./run_all.sh [PROFILE] [--from NN] [--only NN,NN] [--set name=value ...]
#   ./run_all.sh --list     profiles, notebooks and parameters
#   ./run_all.sh --help     all options
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
cd "$(pwd -P)"

extras=notebooks
. ./environment.sh
if [ "${1:-}" = --list ]; then
    exec "$python" -m paperlib list
fi
exec "$python" -m paperlib run "$@"
