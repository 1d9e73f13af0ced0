# Baton for CPUs, with the small model inside. Build from the root: docker build -f deploy/images/cpu.Dockerfile .
# Pin the base by digest where you build: --build-arg BASE=python:3.11.14-slim-bookworm@sha256:...
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/baton/venv
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
RUN pip install --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu '.[otel]'
RUN printf 'model: {cache_dir: /opt/baton/models}\n' > /tmp/model.yaml \
    && baton model pull --config /tmp/model.yaml

FROM ${BASE}
# g++ compiles the CPU kernels for the machine it starts on; wget is what probes ask with; tini passes signals on.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 baton \
    && useradd --uid 1000 --gid 1000 --create-home baton
COPY --from=build /opt/baton/venv /opt/baton/venv
COPY --from=build --chown=1000:1000 /opt/baton/models /opt/baton/models
COPY deploy/images/bin /opt/baton/bin
ENV PATH=/opt/baton/bin:/opt/baton/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /home/baton
EXPOSE 6379 8000 8080 8265 9000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=6 CMD ["/opt/baton/bin/alive"]
ENTRYPOINT ["tini", "-g", "--", "/opt/baton/bin/ray-node"]
CMD ["ray", "start", "--head", "--block", "--dashboard-host=0.0.0.0"]
