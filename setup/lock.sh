#!/usr/bin/env bash
# Resolves pyproject.toml in a clean environment and writes requirements.lock.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet --disable-pip-version-check ".[dev]"
{
  sed -n '/^#/p' requirements.lock
  # torch's own CUDA packages stay out: torch's metadata pins them, and its CPU build has none. A toolkit package that the
  # project pins, or numba-cuda asks for, stays in.
  "$scratch/venv/bin/pip" freeze --all --exclude pip --exclude attention-from-scratch |
    sed 's/+cpu$//' |
    grep -v -i -E '^(triton|nvidia-(cublas|cuda-cupti|cudnn|cufft|cufile|curand|cusolver|cusparse|cusparselt|nccl|nvshmem|nvtx)(-cu13)?)==' |
    sort -f
} >requirements.lock.new
mv requirements.lock.new requirements.lock
