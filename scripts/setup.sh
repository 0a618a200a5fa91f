#!/usr/bin/env bash
# What the Makefile needs before it can run anything, step by step:
#   scripts/setup.sh venv    .venv, made with $PYTHON or the first suitable Python found
#   scripts/setup.sh tools   PyTorch and what building needs, at the versions of constraints.txt
#   scripts/setup.sh build   resnet_fast, editable, with its native extension where that can be built
# pip's own output goes to .venv/pip.log; the terminal shows one line per download and what was built.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv
log=$venv/pip.log
suitable='import sys, venv; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 13)))'

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c "$suitable" >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "error: ${PYTHON:-python3} is not a usable Python 3.11, 3.12 or 3.13 with its venv module." >&2
    echo "       Install one (on Debian and Ubuntu: python3 and python3-venv), or name it: make PYTHON=/path/to/python3.12" >&2
    return 1
}

# One line per package fetched, so that a long download is seen to move; the rest is in the log.
pip_install() {
    local status=0
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input --log "$log" install --progress-bar off --no-compile \
        --constraint constraints.txt "$@" 2>&1 </dev/null |
        sed -nu -E -e 's/^ *Downloading ([^ ]*\.whl)(\.metadata)?( \([^)]*\))?.*/    \1\3/;T next;/kB\)/d;p;d' \
            -e ':next' -e 's/^Installing collected packages.*/    unpacking .../p' ||
        status=$?
    if [ "$status" -ne 0 ]; then
        echo "error: pip failed; its full output is in $log. In short:" >&2
        grep -oE 'resnet-fast build: .*|[^ ]*:[0-9]+: (fatal )?error: .*|ERROR: .*' "$log" | grep -v present-rich |
            awk '!seen[$0]++' | tail -n 20 | cut -c 1-300 | sed 's/^/    /' >&2
    fi
    return "$status"
}

case "${1:-}" in
venv)
    python=$(find_python)
    echo "==> creating $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
    ;;
tools)
    echo "==> installing PyTorch and the build tools into $venv (up to 3 GB; minutes the first time)"
    : >"$log"
    pip_install torch torchvision "setuptools>=64" wheel ninja
    ;;
build)
    echo "==> building resnet_fast (RESNET_FAST_BUILD=${RESNET_FAST_BUILD:-auto}) and installing what its tests and demo use"
    : >"$log"
    pip_install --no-build-isolation --editable ".[dev]"
    grep -o 'resnet-fast build: .*' "$log" | awk '!seen[$0]++' | sed 's/^/    /' || true
    ;;
*)
    sed -n '2,6p' "$0" >&2
    exit 2
    ;;
esac
