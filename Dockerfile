# syntax=docker/dockerfile:1
# Megatron with MiLe Loss on NVIDIA's PyTorch image; how to run it: examples/README.md.
# The base is the one that Megatron-LM's core_v0.19.0 names in docker/.ngc_version.dev; its PyTorch
# and Transformer Engine, and all else that it has, stay as they are.
FROM nvcr.io/nvidia/pytorch:26.06-py3

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /workspace/megatron_mile
COPY pyproject.toml constraints.txt README.md ./
COPY megatron_mile megatron_mile
COPY examples examples
COPY tools tools

# What the base has keeps its version, what it lacks gets the one of constraints.txt. The base's own
# list of pins would hold back packages that it does not even install. Fails when torch has changed.
ENV PIP_CONSTRAINT=""
RUN state='import torch; from importlib.metadata import version; \
        print(torch.__version__, torch.__file__, version("transformer_engine"))' \
    && before=$(python -c "$state") \
    && pip list --format=freeze --exclude-editable > /tmp/base.txt \
    && awk -F== '{name = tolower($1); gsub(/[-_.]+/, "-", name)} \
        NR == FNR {base[name]; print} NR != FNR && !(name in base)' \
        /tmp/base.txt constraints.txt > /tmp/pins.txt \
    && pip install --no-cache-dir --editable '.[train]' --constraint /tmp/pins.txt \
    && test "$before" = "$(python -c "$state")" \
    && rm /tmp/base.txt /tmp/pins.txt

# There is no .git here: the commit, for the record of each run.
ARG COMMIT
RUN if [ -n "${COMMIT:-}" ]; then echo "$COMMIT" > megatron_mile/COMMIT; fi

# Any user may run it (docker run --user): caches go to a home that everybody can write.
ENV HOME=/home/mile
RUN useradd --create-home --uid 10001 mile \
    && install --directory --mode 1777 runs \
    && chmod 1777 /home/mile
USER 10001
