#!/usr/bin/env bash
# Makes .venv in the project's folder if there is none, and installs clipmini in it with an extra: make_venv.sh [extra]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# A venv whose making was interrupted has no pip: make it again.
.venv/bin/python -m pip --version >/dev/null 2>&1 || python3 -m venv --clear .venv
echo "installing into $PWD/.venv (the first time this takes minutes)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}"
