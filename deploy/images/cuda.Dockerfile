# Baton for NVIDIA GPUs (sm_80, sm_90). Build from the root: docker build -f deploy/images/cuda.Dockerfile .
# Torch's wheel brings the CUDA libraries; from the base come the driver's interface and, for Triton, a C compiler.
# Pin the base by digest where you build: --build-arg BASE=nvidia/cuda:12.9.1-base-ubuntu24.04@sha256:...
ARG BASE=nvidia/cuda:12.9.1-base-ubuntu24.04

FROM ${BASE} AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/baton/venv
ENV PATH=/opt/baton/venv/bin:$PATH
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY baton baton
COPY router router
COPY prefill_worker prefill_worker
COPY decode_worker decode_worker
COPY kvtransfer kvtransfer
COPY engine engine
COPY placement placement
COPY deploy deploy
RUN pip install --constraint constraints.txt '.[gpu,otel]'

FROM ${BASE}
# gcc is Triton's; wget is what probes ask with; tini passes signals on. Ubuntu has a user 1000 already.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc ibverbs-providers libc6-dev libibverbs1 python3 python3-dev tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && userdel --remove ubuntu \
    && groupadd --gid 1000 baton \
    && useradd --uid 1000 --gid 1000 --create-home baton
COPY --from=build /opt/baton/venv /opt/baton/venv
COPY deploy/images/bin /opt/baton/bin
ENV PATH=/opt/baton/bin:/opt/baton/venv/bin:$PATH PYTHONUNBUFFERED=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /home/baton
EXPOSE 6379 8000 8080 8265 9000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=6 CMD ["/opt/baton/bin/alive"]
ENTRYPOINT ["tini", "-g", "--", "/opt/baton/bin/ray-node"]
CMD ["ray", "start", "--head", "--block", "--dashboard-host=0.0.0.0"]
