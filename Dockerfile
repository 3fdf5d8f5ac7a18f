# Builds an image that serves the shipped model through Ray on port 8000:
#   docker build -t tessera . && docker run --rm -p 8000:8000 --shm-size=1g tessera
# For NVIDIA GPUs:
#   docker build -t tessera:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#   docker run --rm -p 8000:8000 --shm-size=1g --gpus all -e TESSERA_NUM_GPUS=1 tessera:cuda
# CUDA's libraries come with torch; the machine needs the driver and NVIDIA's container toolkit.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# The distribution's security updates are worth more than the same compiler each time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && useradd --create-home --uid 10001 tessera
USER 10001:10001
WORKDIR /home/tessera
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --chown=tessera pyproject.toml setup.py constraints.txt LICENSE README.md ./
RUN python3 -m venv .venv \
    && torch=$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml) \
    && .venv/bin/pip install --no-cache-dir --only-binary :all: --extra-index-url "$TORCH_INDEX" "$torch"
COPY --chown=tessera model ./model
COPY --chown=tessera service ./service
RUN .venv/bin/pip install --no-cache-dir --only-binary :all: --constraint constraints.txt .

FROM ${BASE}
# tini reaps the processes that Ray leaves to process 1. In Kubernetes a shell without this PATH starts Ray.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 tessera \
    && ln -s /home/tessera/.venv/bin/ray /usr/local/bin/ray
COPY --from=build --chown=tessera /home/tessera/.venv /home/tessera/.venv
# By number, for those who check that it is not 0.
USER 10001:10001
WORKDIR /home/tessera
ENV PATH=/home/tessera/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TESSERA_HOST=0.0.0.0 \
    TESSERA_PORT=8000 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['TESSERA_PORT'] + '/livez', timeout=4)"]
ENTRYPOINT ["tini", "--"]
CMD ["tessera", "serve"]
