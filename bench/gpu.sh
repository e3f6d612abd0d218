#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in one command and less than nine minutes: the machine, the parts of a step,
# the tests that need a GPU, compute-sanitizer where it is installed, the recurrent rows beside cuDNN, and attention,
# norms and convolutions beside SDPA, torch.compile and other packages.
#
#   bench/gpu.sh                        into bench/results/<GPU>/, which is also where it goes on after an interruption
#   bench/gpu.sh --only rows --variants --filter 'lstm .*inference' build/gpu
#   bench/gpu.sh --only layers          attention, norms and convolutions alone
#   bench/gpu.sh --help                 all options
#
# It runs from the sources as they are: torch with CUDA, and the cuda-bindings and NVRTC that come with it, are all it needs.
#   PYTHON  the interpreter; else .venv's if there is one with CUDA, else python3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if .venv/bin/python -c 'import torch, sys; sys.exit(torch.version.cuda is None)' 2>/dev/null; then
    PYTHON=.venv/bin/python
  fi
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$PYTHON" -m bench.gpu.session "$@"
