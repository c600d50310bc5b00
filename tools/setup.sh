#!/bin/sh
# Makes .venv with the locked versions and installs Motorpool into it. Does nothing when it is already up to date.
set -eu
cd "$(dirname "$0")/.."
venv=.venv
say() { printf '\033[1m==>\033[0m %s\n' "$1"; }

find_python() {
  for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null 2>&1 &&
      "$name" -c 'import sys; sys.exit(not (sys.version_info >= (3, 11)))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "Motorpool needs Python 3.11 or newer. Install it, or name it: make PYTHON=/path/to/python3.11 $*" >&2
  exit 1
}

make_venv() {
  if "$1" -c 'import ensurepip' 2>/dev/null; then
    "$1" -m venv "$venv"
  elif "$1" -m pip --version >/dev/null 2>&1; then
    "$1" -m venv --without-pip "$venv"
    "$1" -m pip --python "$venv/bin/python" install --quiet pip
  else
    echo "Python's venv module is incomplete here. Run: apt-get install python3-venv" >&2
    exit 1
  fi
}

stamp=$(cat requirements/dev.lock requirements/uv.lock pyproject.toml tools/setup.sh | cksum | tr ' ' '-')
if [ -f "$venv/.ready" ] && [ "$(cat "$venv/.ready")" = "$stamp" ]; then
  exit 0
fi

if [ ! -x "$venv/bin/python" ]; then
  python=$(find_python "$@")
  say "Making the environment in $venv with $("$python" --version)"
  make_venv "$python"
fi
say "Installing the locked packages (about 200 MB, once)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.lock
if ! "$venv/bin/uv" pip sync --quiet --python "$venv/bin/python" --require-hashes requirements/dev.lock 2>"$venv/uv.log"; then
  # uv does not read pip's configuration; where a proxy or mirror is set only there, pip itself does the work.
  say "Installing with pip instead, which takes a little longer"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.lock
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
printf '%s' "$stamp" >"$venv/.ready"
