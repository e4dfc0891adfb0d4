# docker build -f docker/cuda.Dockerfile -t dino .
# docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" dino train --data photos/ --out runs/a
# PyTorch's wheels bring CUDA along, so that the host needs only its driver.
FROM python:3.12-slim

WORKDIR /opt/dino
COPY pyproject.toml README.md LICENSE ./
COPY src src
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[all]'

WORKDIR /work
ENTRYPOINT ["dino"]
CMD ["--help"]
