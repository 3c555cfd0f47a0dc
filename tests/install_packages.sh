#!/usr/bin/env bash
# Installs from Debian what the tests with a cluster, a network of their own or a browser need (as root), and starts nothing.
set -euo pipefail
missing=()
for program in slurmctld slurmd sbatch ip chromium; do
    command -v "$program" >/dev/null || missing+=("$program")
done
((${#missing[@]})) || exit 0
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy" # the daemons of the machine itself stay off
    chmod +x "$policy"
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
    slurmctld slurmd slurm-client iproute2 chromium >/dev/null
