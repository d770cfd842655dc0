# docker build --tag finetune .                       (not run here)
# docker run --rm --volume "$PWD:/workspace" --user "$(id -u):$(id -g)" finetune train RECIPE --run runs/a
# A container that is stopped gets SIGTERM: the last finished step is committed, and the same command resumes.
ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE}

ENV HOME=/tmp/home PYTHONUNBUFFERED=1
WORKDIR /opt/finetune
COPY scripts/constraints.txt scripts/constraints.txt
RUN pip install --no-cache-dir torch==2.13.0 \
 && pip install --no-cache-dir --no-deps --requirement scripts/constraints.txt
COPY pyproject.toml README.md LICENSE ./
COPY finetune finetune
RUN pip install --no-cache-dir --no-build-isolation --constraint scripts/constraints.txt .
COPY recipes recipes

WORKDIR /workspace
RUN chown 1000:1000 /workspace && install -d -m 1777 /tmp/home
USER 1000:1000
STOPSIGNAL SIGTERM
ENTRYPOINT ["finetune"]
