#!/usr/bin/env bash
# ray 2.60.0: a driver that `uv run` started packs its working folder, data included, and cannot start beside a large file.
#
# Expected: `ray.init` without a runtime environment sends nothing to the workers, however the driver was started; that is how a
# training script beside its images starts. Seen: below `uv run` it packs everything in the working folder that no .gitignore or
# .rayignore names, refuses more than 512 MiB, and runs workers in the unpacked copy, so relative paths lead to another folder
# there. RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 turns that off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0 uv==0.13.9
mkdir "$folder/project"
cd "$folder/project"
cat >start.py <<'PYTHON'
import os

import ray


@ray.remote
def folder_of_worker() -> str:
    return os.getcwd()


try:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL")
except Exception as error:
    print("cannot start:", "exceeds the maximum size" if "exceeds the maximum size" in str(error) else error)
else:
    same = ray.get(folder_of_worker.remote()) == os.getcwd()
    print("worker is in the driver's folder" if same else "worker is in a copy")
PYTHON
export RAY_USAGE_STATS_ENABLED=0
run() { timeout 240 "$@" 2>/dev/null | tail -n 1; }
under_uv=("$folder/venv/bin/uv" run --no-project --python "$folder/venv/bin/python" start.py)
found=()
note() {
    found+=("$2")
    echo "$1: $2"
}
note "python start.py" "$(run "$folder/venv/bin/python" start.py)"
note "uv run start.py" "$(run "${under_uv[@]}")"
truncate -s 600M images.tar
note "python start.py beside a file of 600 MiB" "$(run "$folder/venv/bin/python" start.py)"
note "uv run start.py beside a file of 600 MiB" "$(run "${under_uv[@]}")"
note "the same with RAY_ENABLE_UV_RUN_RUNTIME_ENV=0" "$(RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 run "${under_uv[@]}")"
here="worker is in the driver's folder"
expected=("$here" "worker is in a copy" "$here" "cannot start: exceeds the maximum size" "$here")
[[ "${found[*]}" == "${expected[*]}" ]] || { echo changed; exit 1; }
echo "as found"
