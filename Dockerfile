# Spatial-Mamba on CPUs, without this repository's tests and history:
#   docker build -t spatial-mamba-d2 .
#   docker run --rm --entrypoint spatial-mamba-d2-doctor spatial-mamba-d2
#   docker run --rm -v "$PWD:/work" spatial-mamba-d2 predict --weights model.pth --input photos --output out --format coco
#   docker run --rm -p 8000:8000 -v "$PWD:/work" spatial-mamba-d2 serve --host 0.0.0.0 --weights model.pth
# It runs as user 1000; --user "$(id -u):$(id -g)" writes files that are yours if you are another one.
# No version is pinned here: the compiler is Debian's, and pyproject.toml bounds the packages.
# hadolint global ignore=DL3008,DL3013
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# In a layer of its own, which changes of the sources do not build again
RUN pip install --index-url https://download.pytorch.org/whl/cpu torch torchvision \
    && pip install "setuptools>=77,<81" wheel ninja
WORKDIR /src
COPY . .
# An error, rather than an image that runs slowly, if the operators cannot be compiled
RUN SMD2_BUILD_NATIVE=1 pip install --no-build-isolation ".[detection,segmentation,classification,serve]" \
    && python -m spatial_mamba_d2.system.install_detectron2

# All libraries that the packages need are in their wheels or in this image.
FROM python:3.12-slim
RUN useradd --create-home --uid 1000 user && install --directory --owner user /work
COPY --from=build /opt/venv /opt/venv
# matplotlib's cache, because users of other numbers have no home
ENV PATH=/opt/venv/bin:$PATH MPLCONFIGDIR=/tmp/matplotlib
USER 1000
WORKDIR /work
ENTRYPOINT ["spatial-mamba-d2"]
CMD ["--help"]
