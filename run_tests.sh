#!/usr/bin/env bash
# Runs all tests and all notebooks, and installs what they need first.
#
#   ./run_tests.sh [pytest options]     for example -x, -k heads or -m "not slow"
#
# What they compute goes to a temporary folder.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
cd "$(pwd -P)"

echo "Running the tests and the notebooks: 8 to 16 minutes on 2 cores, plus the installation if it is the first time" >&2
extras=notebooks,tests,site
. ./environment.sh

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export PAPERLIB_RUNS=$folder PAPERLIB_HEADLESS=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # one thread a process: those of two processes would wait for each other
"$python" -m pytest -n logical --maxprocesses 4 --dist loadfile --nbval-lax --nbval-current-env tests notebooks "$@"
