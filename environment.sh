# shellcheck shell=bash
# Sourced by run_all.sh and run_tests.sh, from this folder and with `extras` set to the
# optional dependencies that they need. Sets `python` to an interpreter that can run the
# project: the active one if this checkout is installed in it with those extras, else that
# of .venv, which is made on first use and brought up to date when the requirements change.

# glibc hands large blocks back to the system when they are freed, and a training step gets them again a moment later,
# page by page. Keeping them makes steps on a CPU faster (docs/speed.md). Before 2.35, glibc refuses the first setting.
glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null || true)
if [ "$(printf '%s\n' 2.35 "${glibc#glibc }" | sort -V | head -n 1)" = 2.35 ]; then
    export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}"
    export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
fi

: "${extras:?}"
stamp=paperlib-requirements # a file in .venv: the checksum of what was installed, or "unfinished"

# Can interpreter $1 run this checkout? -P and -E: it has to be installed, which being found
# through the working directory or PYTHONPATH is not. In .venv, the stamp decides instead.
is_ready() {
    "$1" -P -E - "$PWD" "$extras" "$stamp" 2>/dev/null <<'PYTHON'
import importlib.util
import os
import sys
import tomllib
from importlib.metadata import version

from packaging.requirements import Requirement

root, extras, stamp = sys.argv[1:]
if os.path.exists(os.path.join(sys.prefix, stamp)):
    sys.exit(1)
package = os.path.dirname(importlib.util.find_spec("paperlib").origin)
if not os.path.samefile(package, os.path.join(root, "paperlib")):
    sys.exit(1)
with open(os.path.join(root, "pyproject.toml"), "rb") as file:
    project = tomllib.load(file)["project"]
lists = [project["dependencies"], *(project["optional-dependencies"][e] for e in extras.split(","))]
for requirement in map(Requirement, sum(lists, [])):
    if not requirement.specifier.contains(version(requirement.name), prereleases=True):
        sys.exit(1)
PYTHON
}

# Is $1 a Python 3.11 or newer that has the module(s) $2?
has() {
    "$1" -c "import sys; assert sys.version_info >= (3, 11); import $2" >/dev/null 2>&1
}

stop() {
    echo "$1" >&2
    exit 1
}

make_venv() {
    local name found=""
    for name in python3.14 python3.13 python3.12 python3.11 python3 python; do
        if has "$name" "venv, ensurepip"; then
            echo "Making a virtual environment in .venv with $name" >&2
            "$name" -m venv --clear .venv || stop "$name could not make .venv (see above)."
            return
        elif [ -z "$found" ] && has "$name" sys; then
            found=$("$name" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
        fi
    done
    [ -n "$found" ] || stop "Python 3.11 or newer is needed, and there is none on the PATH."
    stop "$found cannot make virtual environments: install $found-venv (its name on Debian and Ubuntu)."
}

python=""
for name in python3 python; do
    if is_ready "$name"; then
        python=$(command -v "$name")
        break
    fi
done

if [ -z "$python" ]; then
    python=$PWD/.venv/bin/python
    if command -v flock >/dev/null; then # two that make .venv at once would destroy each other's
        exec 9>.venv.lock
        flock -n 9 || { echo "Waiting for another process that makes .venv" >&2; flock 9; }
    fi
    wanted=$({ echo "$PWD"; cat pyproject.toml constraints.txt; } | cksum)
    installed=$(cat ".venv/$stamp" 2>/dev/null || true)
    if [ "$installed" = unfinished ] || ! has "$python" pip; then
        make_venv
        installed=none
    fi
    if [ "$installed" != "$wanted" ]; then
        echo "Installing the requirements into .venv: about 3 to 5 minutes, and 6 GB with the" \
            "CUDA build of torch (the default on Linux)" >&2
        # An environment made here is made anew after an interruption; one made by hand is not.
        [ -z "$installed" ] || echo unfinished >".venv/$stamp"
        # PIP_USER and the like would put packages elsewhere.
        env -u PIP_USER -u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT "$python" -m pip install -qq --disable-pip-version-check \
            -e ".[notebooks,tests,site]" -c constraints.txt ||
            stop "The installation into .venv failed (see above): run this again to repeat it."
        echo "$wanted" >".venv/$stamp"
    fi
    exec 9>&-
fi
