# docker build --tag finetune .        (docs/container.md; scripts/container builds it without Docker as well, and tries it out)
# BASE is of Debian or Ubuntu, with Python 3.11 or newer or none. CUDA's libraries come with torch, so it needs none of them.
# TORCH is `locked`, for CUDA 13; `base` where BASE brings its own, as NGC's do; or a requirement that needs none of CUDA's libraries, such as
# a CPU's, which then is not held to a hash.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS interpreter
SHELL ["/bin/sh", "-euc"]
# The distribution of BASE decides which Python it has.
# hadolint ignore=DL3008
RUN if ! python3 -c 'import ctypes, sqlite3, venv' 2>/dev/null; then \
        apt-get update; \
        DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3; \
        rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*; \
    fi; \
    python3 -c 'import sys; assert sys.version_info >= (3, 11), f"BASE has Python {sys.version}"'

FROM interpreter AS dependencies
ARG TORCH=locked
# Constraints of NGC's images would forbid what is locked.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_CONSTRAINT=
WORKDIR /build
COPY scripts/locked/ ./
# Of its pip as well, which stays in this stage.
# hadolint ignore=DL3008
RUN if ! python3 -m pip --version; then \
        apt-get update; \
        DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-pip; \
        rm -rf /var/lib/apt/lists/*; \
    fi; \
    if [ "${TORCH}" = base ]; then python3 -m venv --without-pip --system-site-packages /opt/finetune; \
    else python3 -m venv --without-pip /opt/finetune; fi; \
    install() { python3 -m pip --python /opt/finetune/bin/python install --no-deps "$@"; }; \
    case "${TORCH}" in \
        base) /opt/finetune/bin/python -c 'import torch' ;; \
        locked) install --require-hashes --requirement torch.txt ;; \
        *) install "${TORCH}" ;; \
    esac; \
    install --require-hashes --requirement others.txt; \
    find /opt/finetune -type d -name tests -prune -exec rm -rf {} +

# A separate layer: a new version of the package does not rebuild the gigabytes before it.
FROM dependencies AS package
COPY pyproject.toml README.md LICENSE ./
COPY finetune finetune
RUN python3 -m pip --python /opt/finetune/bin/python install --no-deps --no-build-isolation --prefix /opt/package .

FROM interpreter
ARG REVISION=unknown
LABEL org.opencontainers.image.title="finetune" \
      org.opencontainers.image.description="A fine-tuning pipeline in which every checkpoint is a commit" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=dependencies /opt/finetune /opt/finetune
COPY --from=package /opt/package /opt/finetune
# For any user: one who has no name here, and whose only places are the volumes, under a file system that is read-only.
RUN install -d -m 1777 /cache /runs
ENV PATH="/opt/finetune/bin:${PATH}" PYTHONUNBUFFERED=1 LOGNAME=finetune \
    HOME=/cache TMPDIR=/cache XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface FINETUNE_RUNS=/runs \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME ["/cache", "/runs"]
WORKDIR /runs
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=1m --timeout=30s --start-period=1m --retries=3 CMD ["finetune", "health"]
ENTRYPOINT ["finetune"]
CMD ["--help"]
