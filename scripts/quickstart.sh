#!/usr/bin/env bash
# From nothing to a trained model that names pictures it has never seen; takes overrides: quickstart.sh seed=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/make_venv.sh
.venv/bin/clipmini train "$@"
