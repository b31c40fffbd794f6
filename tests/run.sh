#!/usr/bin/env bash
# The test suite, on a machine that needs nothing but python3, venv and g++ (launcher/environment.sh installs the rest).
#   bash tests/run.sh [pytest args]    everything but the tests marked slow or soak: 26 minutes on 2 slow cores
#   bash tests/run.sh --all [...]      the slow ones too
#   bash tests/run.sh --soak [...]     the tests marked soak alone: longer; each can be run by its name
# Two files at a time, since tests that start processes wait for one another more than they compute; `-n 0` for one.
# It runs in the project's folder whatever the working directory: paths in the arguments start there.
# Tests on real data run where DYNRANK_DATA_DIR names its folder, and are skipped elsewhere.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launcher/environment.sh"

choice="not slow and not soak"
parallel=(-n 2 --dist loadfile)
case ${1-} in
--all) choice="not soak"; shift ;;
--soak) choice=soak; parallel=(); export DYNRANK_SOAK_MINUTES="${DYNRANK_SOAK_MINUTES:-60}"; shift ;;
esac

export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cd "$DYNRANK_ROOT"
exec python -m pytest "${parallel[@]}" -m "$choice" "$@"
