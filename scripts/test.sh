#!/usr/bin/env bash
# Lints, checks types and tests; takes pytest's arguments: test.sh -k plan
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/make_venv.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
