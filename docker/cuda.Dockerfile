# fisher-vmap on NVIDIA GPUs:  docker build --file docker/cuda.Dockerfile --tag fisher-vmap:cuda .
# Torch brings its own CUDA libraries; the machine needs a driver and NVIDIA's container toolkit (docker run --gpus all).
FROM python:3.12.12-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY fisher_vmap ./fisher_vmap
RUN pip install --no-cache-dir --constraint constraints.txt ".[accelerate,gguf,peft,ray,report]" bitsandbytes \
    && useradd --create-home --uid 1000 fisher \
    && mkdir --parents /cache /work \
    && chown fisher:fisher /cache /work

# Models and data sets of the hub, and converted .gguf files, outlive the container.
VOLUME ["/cache"]
USER 1000
WORKDIR /work
ENTRYPOINT ["fisher-vmap"]
CMD ["--help"]
