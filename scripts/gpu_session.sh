#!/usr/bin/env bash
# Everything a machine with a GPU should be asked, in one run: correctness first, then timing.
#   scripts/gpu_session.sh OUTPUT_DIR
# Builds the extension with CUDA in place against the python3 on PATH, which must have torch, pytest and rich.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/gpu_session.sh OUTPUT_DIR}
mkdir -p "$out"
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(python3 -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}

step() { # a failed step is told and remembered, and the next one still runs
    local name=$1
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$out/$name.log" | tail -n 40
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || { echo "== $name FAILED ($status)"; failed=1; }
}

failed=0
RESNET_FAST_BUILD=cuda step build python3 setup.py build_ext --inplace
step tests python3 -m pytest -q -m gpu tests
step info python3 -m resnet_fast info
step verify python3 -m resnet_fast verify
for model in resnet50 resnet18; do
    step "bench-$model" python3 -m resnet_fast bench --model "$model" -b 256 --device cuda --bench both \
        --amp-dtype bfloat16 --torchcompile --json "$out/bench-$model.json"
done
exit "$failed"
