# The image holds what `make setup` installs, which is what CI tests.
#
#   docker build -t hydra .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/data:/hydra/data" -v "$PWD/runs:/hydra/runs" hydra \
#     run recipes/imagenet_resnet50_linf4.yaml
#   docker run --rm --shm-size 8g --entrypoint make hydra test
#
# --shm-size: Ray keeps its objects in /dev/shm, for which Docker's default is 64 MB.
FROM debian:bookworm-slim
WORKDIR /hydra
ENV PIP_NO_CACHE_DIR=1
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
# Only what the set-up reads, so that a code change does not reinstall everything.
COPY Makefile pyproject.toml requirements.txt constraints.txt ./
COPY .ci/setup.sh .ci/
RUN make setup && rm -rf /var/lib/apt/lists/*
# A task of slurm.container_image starts python3: this has it be the one with the project, and not Debian's.
ENV PATH=/hydra/.venv/bin:$PATH
COPY . .
ENTRYPOINT ["hydra-pipeline"]
CMD ["--help"]
