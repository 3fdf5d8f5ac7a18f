# Builds an image that serves the shipped model through Ray on port 8000:
#   docker build -t tessera . && docker run --rm -p 8000:8000 --shm-size=1g tessera
# For NVIDIA GPUs: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130, then docker run --gpus all with
# -e TESSERA_NUM_GPUS=1.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && useradd --create-home --uid 10001 tessera
USER tessera
WORKDIR /home/tessera
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --chown=tessera pyproject.toml setup.py constraints.txt LICENSE README.md ./
RUN python3 -m venv .venv \
    && torch=$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml) \
    && .venv/bin/pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" "$torch"
COPY --chown=tessera model ./model
COPY --chown=tessera service ./service
RUN .venv/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM ${BASE}
# tini reaps the processes that Ray leaves to process 1.
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 tessera
COPY --from=build --chown=tessera /home/tessera/.venv /home/tessera/.venv
USER tessera
WORKDIR /home/tessera
ENV PATH=/home/tessera/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TESSERA_HOST=0.0.0.0 \
    TESSERA_PORT=8000
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD python3 -c 'import os, urllib.request as r; r.urlopen("http://127.0.0.1:" + os.environ["TESSERA_PORT"] + "/livez", timeout=4)'
ENTRYPOINT ["tini", "--"]
CMD ["tessera", "serve"]
