#!/usr/bin/env bash
# mlflow-skinny 3.17.2: installed alone, it can log a metric to no local store by default.
#
# Expected: the package for logging without a server writes to a folder or a database file by default, as mlflow does. Seen:
# the folder store refuses unless MLFLOW_ALLOW_FILE_STORE=true ("maintenance mode") and recommends sqlite; sqlite is refused as an
# unsupported scheme of the model registry, although no model is registered, because sqlalchemy is not among the package's
# requirements. So the advice of the first error leads to the second.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mlflow-skinny==3.17.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.util
import os

import mlflow
from mlflow import MlflowClient


def log(uri: str) -> str:
    try:
        client = MlflowClient(uri)
        run = client.create_run(client.create_experiment("trial"))
        client.log_metric(run.info.run_id, "loss", 1.0)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:110]}"
    return "logged"


os.environ.pop("MLFLOW_ALLOW_FILE_STORE", None)
seen = {"folder": log("file:./runs"), "sqlite": log("sqlite:///runs.db")}
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
seen["folder, allowed"] = log("file:./runs")
print(f"mlflow-skinny {mlflow.__version__}")
for store, said in seen.items():
    print(f"  {store}: {said}")
assert "maintenance mode" in seen["folder"], "changed"
assert "UnsupportedModelRegistryStoreURI" in seen["sqlite"], "changed"
assert importlib.util.find_spec("sqlalchemy") is None, "changed"
assert seen["folder, allowed"] == "logged", "changed"
print("as found")
PYTHON
