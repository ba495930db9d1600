# The versions that were tested together. docs/clusters.md has the line that starts it on a cluster.
#   docker build -t megatron-sft .
FROM python:3.12-slim
# A compiler for torch's kernels that are made on the spot.
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/megatron-sft
COPY setup.py constraints.txt ./
COPY finetune.py model_provider.py ./
COPY data data
COPY post_training post_training
COPY scripts scripts
# torch's wheels bring CUDA's libraries; the host brings the driver.
RUN pip install --no-cache-dir -c constraints.txt -e '.[lora,ray]'
ENTRYPOINT []
CMD ["python", "scripts/launch.py", "finetune.py", "--help"]
