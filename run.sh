#!/usr/bin/env bash
# The door: makes .venv on first use, then hands its words to petseg.py. `./run.sh test` runs the
# tests. PYTHON=... chooses the Python that the .venv is made with.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=$here/.venv

# .venv/installed is written last, so an installation that broke off is taken up again
if ! cmp -s "$here/requirements.txt" "$venv/installed"; then
  for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    "$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
    python=
  done
  if [ -z "$python" ]; then
    echo "petseg: Python 3.10 or later with venv is needed; install it, or set PYTHON=..." >&2
    exit 2
  fi
  echo "petseg: installing into $venv, once; torch is large" >&2
  if ! "$python" -m venv "$venv" >&2 ||
     ! "$venv/bin/python" -m pip install --disable-pip-version-check -q -r "$here/requirements.txt" >&2
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
exec "$venv/bin/python" "$here/petseg.py" "$@"
