#!/usr/bin/env bash
# Adds Slurm and munge to a fresh Debian or Ubuntu, for the private cluster of tests/slurm: seconds, as root only.
# They run, and this installs anything, with SFTRL_TEST_SLURM=1 only: their jobs take some 15 minutes.
set -euo pipefail
if [ "${SFTRL_TEST_SLURM:-}" != 1 ] || command -v slurmctld > /dev/null || [ -x /usr/sbin/slurmctld ]; then
  exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "tests/slurm will fail: no slurmctld here, and only root of a Debian can be given one"
  exit 0
fi
echo "installing slurm-wlm and munge for tests/slurm"
install=(apt-get -qq -o DPkg::Lock::Timeout=60 install --no-install-recommends --yes slurm-wlm munge)
export DEBIAN_FRONTEND=noninteractive
timeout 300 bash -c "apt-get -qq update; ${install[*]}" > /dev/null \
  || echo "tests/slurm will fail: slurm-wlm and munge could not be installed"
