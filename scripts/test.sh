#!/usr/bin/env bash
# Lints, checks types and tests, two tests at a time; takes pytest's arguments: test.sh -k plan, test.sh -n 8
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/make_venv.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
