# docker build -f docker/cpu.Dockerfile --build-arg TORCH_INDEX=ADDRESS -t dino-cpu .
# docker run --rm --shm-size 2g -v "$PWD:/work" dino-cpu train --data photos/ --out runs/a
# ADDRESS is the index of PyTorch's CPU builds, as pytorch.org/get-started shows it (Linux, Pip, CPU): 2 GB in place of 8.
FROM python:3.12-slim

ARG TORCH_INDEX
WORKDIR /opt/dino
COPY pyproject.toml README.md LICENSE ./
COPY src src
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX:?give --build-arg TORCH_INDEX=ADDRESS}" torch torchvision \
    && pip install --no-cache-dir '.[all]'

WORKDIR /work
ENTRYPOINT ["dino"]
CMD ["--help"]
