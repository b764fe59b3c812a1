# One image for every node of a cluster (docs/cluster.md), and for a server of its own:
#
#   docker build -t imprint .
#   docker run -p 127.0.0.1:8000:8000 -v imprint:/var/lib/imprint imprint
#
#   ENGINE=cpu|gpu   which vLLM; gpu needs NVIDIA's container runtime on the host
#
# No secrets go in: keys, passwords and tokens come from the environment of the container.
FROM python:3.11-slim

ARG ENGINE=cpu

# numactl's library and OpenMP for vLLM, make for the installation, wget for KubeRay's probes, a compiler for Triton's
# kernels on a GPU.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 libnuma1 make wget \
    && if [ "$ENGINE" = gpu ]; then apt-get install --yes --no-install-recommends gcc libc6-dev; fi \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/imprint

COPY Makefile pyproject.toml LICENSE README.md ./
COPY constraints constraints
COPY hypernet hypernet
COPY router router
COPY serve serve
COPY configs configs
RUN PIP_NO_CACHE_DIR=1 make install ENGINE=$ENGINE \
    && .venv/bin/pip install --no-cache-dir --no-deps --requirement constraints/s3.txt

# The user that Ray's and vLLM's processes run as owns its data and its home, not the program.
RUN useradd --create-home --uid 1000 imprint && install -d -o imprint -g imprint -m 700 /var/lib/imprint
USER imprint

# What `imprint serve` sets by itself and `ray start` does not. The shipped models need no hub; HF_HUB_OFFLINE=0 lets
# others be fetched.
ENV PATH=/opt/imprint/.venv/bin:$PATH \
    IMPRINT_DATA_DIR=/var/lib/imprint \
    RAY_worker_niceness=0 \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1 \
    TOKENIZERS_PARALLELISM=false \
    HF_HUB_OFFLINE=1

EXPOSE 8000
# Loopback in a container reaches nobody outside of it.
RUN sed 's/host: 127.0.0.1/host: 0.0.0.0/' configs/nano.yaml > /home/imprint/imprint.yaml
CMD ["imprint", "serve", "/home/imprint/imprint.yaml"]
