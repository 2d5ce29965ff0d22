# The command line in a container.
#
#     docker build -t detdistill .                                    CPU only
#     docker build -t detdistill --build-arg TORCH=cu130 .            with CUDA, for docker run --gpus all
#     docker run --rm -v "$PWD:/data" detdistill demo --out /data/runs/demo
#
# TORCH is a backend of PyTorch that uv knows: cpu, cu130, ... A container has little shared memory for loading processes: with
# --workers above 0, run it with --ipc=host.
FROM python:3.11-slim
ARG TORCH=cpu
ENV UV_SYSTEM_PYTHON=1 UV_NO_CACHE=1 PYTHONUNBUFFERED=1
RUN pip install --no-cache-dir uv
WORKDIR /detdistill
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN uv pip install --torch-backend="$TORCH" ".[hf,export]"
WORKDIR /data
ENTRYPOINT ["detdistill"]
CMD ["--help"]
