#!/usr/bin/env bash
# Everything that waits for a GPU, in one command of under ten minutes: tests, kernels against the hardware's limits,
# and a decode step of an 8B-shaped model. Needs torch, triton and pytest, no Ray and no NIXL. The table comes last;
# whole logs and results lie in OUT (default: build/gpu).
#   PYTHON=python3 OUT=/tmp/gpu bench/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH=.

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "no CUDA device: the tests skip, the kernels are only compiled, nothing is measured"
}

declare -A ended
# step NAME LIMIT_S COMMAND...: runs it, its output in OUT/gpu-NAME.log
step() {
  local name=$1 limit_s=$2
  shift 2
  echo "== $name"
  timeout --kill-after=5 "$limit_s" "$@" >"$OUT/gpu-$name.log" 2>&1
  ended[$name]=$?
  echo "   exit status ${ended[$name]}"
}

# No configuration of the project: a bare machine lacks the plugins that it names.
step tests 210 "$PYTHON" -m pytest -c /dev/null --rootdir=. --import-mode=importlib -p no:cacheprovider -q -ra \
  tests/unit/kernels tests/gpu
steps=(tests kernels engine)
if [[ $("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') -ge 2 ]]; then  # and cryptography, msgpack, xxhash
  steps+=(nccl)
  step nccl 120 "$PYTHON" -m pytest -c /dev/null --rootdir=. --import-mode=importlib -p no:cacheprovider -q -ra \
    tests/unit/kvtransfer/test_transport_contract.py -k nccl
else
  echo "fewer than two GPUs: handoff.transport nccl is not tested"
fi
step kernels 210 "$PYTHON" -m bench.kernels
step engine 120 "$PYTHON" -m bench.engine gpu --batch 64

for result in kernels-gpu engine-gpu; do
  cp -f "bench/results/$result.json" "$OUT/" 2>/dev/null || true
done
failed=0
for name in "${steps[@]}"; do
  printf '\n== %s: exit status %s\n' "$name" "${ended[$name]}"
  tail -n 60 "$OUT/gpu-$name.log"
  [[ ${ended[$name]} == 0 ]] || failed=1
done
exit $failed
