#!/usr/bin/env bash
# Makes .venv on first use, then passes its arguments to petseg.py. `./run.sh test` runs the tests.
# PYTHON=... chooses the Python that .venv is made with.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=$here/.venv
supported='import sys, venv; v = sys.version_info
sys.exit(v < (3, 10, 12) or (3, 11) <= v < (3, 11, 4))'

# .venv/installed is written last, so an installation that broke off is taken up again
if ! cmp -s "$here/requirements.txt" "$venv/installed"; then
  for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    "$python" -c "$supported" 2>/dev/null && break
    python=
  done
  if [ -z "$python" ]; then
    echo "petseg: Python 3.10.12, 3.11.4 or later with venv is needed; install it, or set PYTHON=..." >&2
    exit 2
  fi
  echo "petseg: installing into $venv, once. On Linux pip's torch brings GPU libraries, some gigabytes;" >&2
  echo "petseg: without a GPU, Ctrl-C and start with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" >&2
  if ! "$python" -m venv "$venv" >&2 ||
     ! "$venv/bin/python" -m pip install --disable-pip-version-check -r "$here/requirements.txt" >&2
  then
    echo "petseg: the installation failed, see above; ./run.sh tries again" >&2
    exit 2
  fi
  cp "$here/requirements.txt" "$venv/installed"
fi

if [ "${1:-}" = test ]; then
  shift
  exec "$venv/bin/python" -m pytest -q -p no:cacheprovider "$here/test_petseg.py" "$@"
fi
# glibc keeps freed memory instead of returning it to the kernel, which clears each new page: on two
# cores a step of UNet takes 250 ms instead of 300, of ResNet34-UNet 212 instead of 235
export MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_THRESHOLD_=16777216 MALLOC_ARENA_MAX=1
export PYTHONIOENCODING=:backslashreplace  # a file name may be undecodable
export PETSEG_PROGRAM=$0  # messages name commands as they can be typed
exec "$venv/bin/python" "$here/petseg.py" "$@"
