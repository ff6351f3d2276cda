# fisher-vmap on a CPU:  docker build --file docker/cpu.Dockerfile --tag fisher-vmap .
# Beside an x86 processor the package index's torch brings GPU libraries of several GB. Torch's own index has builds
# without them: --build-arg TORCH_INDEX=ADDRESS, see docs/running.md.
FROM python:3.12.12-slim-bookworm

ARG TORCH_INDEX=""

ENV PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache

WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch

COPY pyproject.toml README.md LICENSE ./
COPY fisher_vmap ./fisher_vmap
RUN pip install --no-cache-dir --constraint constraints.txt ".[accelerate,gguf,peft,report]" \
    && useradd --create-home --uid 1000 fisher \
    && mkdir --parents /cache /work \
    && chown fisher:fisher /cache /work

# Models and data sets of the hub, and converted .gguf files, outlive the container.
VOLUME ["/cache"]
USER 1000
WORKDIR /work
ENTRYPOINT ["fisher-vmap"]
CMD ["--help"]
